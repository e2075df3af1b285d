"""Other wordings of the graded corpus: what RL would try next, and what instruct models write."""

import pytest

from megatron_qlrl.reward.score import score_response

# (source, gold, text around "@", what stands in its place): the rule gives 0 for each.
WRONG = {
    "denials before the sentence": ("musique", "Paris", "@ the answer is Paris.", [
        "I don't believe", "I wouldn't say that", "It's untrue that", "There's no way",
        "It is hardly the case that", "It's far from certain that", "I am unable to say that",
        "There is no evidence that", "It is disputed that", "We cannot conclude that",
        "It would be incorrect to conclude that", "You can't say", "It is not clear whether",
        "I'm unsure if", "Some say", "Many believe that", "Suppose", "Let's say", "Imagine",
        "One may argue that", "It seems unlikely that", "I reject the claim that",
        "I disagree that", "It is a lie that", "It is a myth that", "In no case",
        "By no means can one say", "Only a fool would say", "Nowhere does it say that",
        "The text contradicts that", "I am guessing", "I'd guess", "Possibly,", "Perhaps,",
        "Maybe,", "Probably", "If I had to guess,", "Not sure, but", "I'm not sure, but",
        "My guess:", "I refuse to believe", "It does not follow that", "It is not so that",
        "It's not the case, I fear, that", "I failed to show that", "It's not that",
    ]),
    "words between sentence and box": ("musique", "Paris", "The answer is @ \\boxed{Paris}.", [
        "not necessarily", "no longer", "far from", "not in", "by no means", "n't", "surely not",
        "hardly", "anywhere but", "any city but", "everything but", "unlikely to be", "possibly",
        "likely", "London or", "London and", "London,", "London;", "London /", "either",
        "London, not", "not London but not", "the opposite of", "contradicted by",
        "different from", "unlike", "excluding", "outside", "near", "the city next to",
        "one of London and", "other than", "!", "¬", "≠", "~",
    ]),
    "words behind a box": ("musique", "Paris", "The answer is \\boxed{Paris}@", [
        "? No.", " / London", " and London", ", or London", ", London", ", though maybe London",
        " - London", " (or London)", " (London)", " not", " is false", " isn't right",
        " is incorrect.", " would be wrong.", " or so", ".\nBut it could be London", "\nLondon",
        "\n\nOr London", "; or London", ": no", "\n\nNo.", "\nHmm, let me reconsider.",
        "\\text{ or London}", "; alternatively London",
        ". London works too.", ". Wait.", " ... no, London", "?", " — or London",
        " – no, London",
    ]),
    "words behind brackets": ("musique", "Paris", "The answer is (Paris)@", [
        "; or London", ". I could be wrong.", ". Not sure though.",
        ". Then again, it may be London.", ". I take that back.",
        ". Ignore that, it was London.", ". It's either that or London.", ". Or it is London.",
        ". I am torn between this and London.", ". I don't think so, though.",
        ". Just a guess, of course.", ". Who knows, it might be London.",
        ". This could be wrong.", ". This is probably wrong.", ". I may be wrong.",
        ". Well, no, it is London.", ". Forget that: it is London.",
        ". On reflection it is London.", ". Strike that, it is London.",
        ". My answer may change to London.", ". I changed my mind to London.",
        ". Let me correct myself, it is London.", ". Let me rethink this.",
        ". I now think it is London.", ". The real answer is in London.",
        ". Oh wait, it is London.", ". Hmm, it is London.", ". Or maybe not.",
        ". It can also be London.", ". London would also be right.",
        ". The other answer is London too.", ". This is not it.",
        ". That is not it, it is London.", ". It isn't, it is London.", ". It was not there.",
        ". One could also say London.", ". London is an alternative answer.",
        ". Otherwise the answer would be London.", ". If not, it is London.",
        ". Both it and London are right.",
    ]),
    "letters": ("long_toc_choices", "B", "The correct answer is @", [
        "B/D", "B | D", "B, C", "B then D", "B C", "BC", "B&C", "B and/or C", "(B)(C)",
        "(B)/(C)", "[B] [C]", "B. C", "B: C", "B = C", "B or (c)", "b or c", "B) or C)",
        "(B or C)", "B, c", "B... or C", "B? C?", "B, not sure", "B (or C)", "B (C)",
        "B [or C]", "(B) unless C", "B—C", "B→C", "B > C", "B, alternatively C", "B; else C",
        "B, if not then C", "B. No wait, C", "B... wait, C.", "B - no, C", "B is not right",
        "B isn't right", "B, which is wrong", "B, or none", "B, or something else", "not B",
        "NOT (B)", "neither B", "never (B)", "anything but (B)", "all but B", "A, B", "A or B",
        "A/B", "A B", "AB", "A) or (B", "everything except (B)", "B cannot be",
        "B. I am not sure.", "B. Maybe D.", "(B) is false", "B (false)", "B ✗", "B (wrong)",
        "B: not correct", "B, rejected", "~~B~~", "!B", "(B) or possibly the last",
        "(B) and the last one", "B and the rest", "(B). (C) is also correct.",
        "(B).\n\nAlternatively (C).", "B.\nThe correct answer could be C.",
        "(B) seller. But (C) could be right.", "(B) seller; maybe (C).",
        "(B) seller, (C) both", "(B) seller or (C) both", "(B) seller or C",
        "(B) seller / (C) both", "(B) seller, but I am not sure.", "(B) seller? Or both?",
        "\n(B)\n(C)", ":\n- B\n- C", "B\n\nC", "(B).\n(C).", "(B). Not (B).", "(B).\nNot sure.",
        "(B) - no.", "(B), no (C)", "\\boxed{B,C}", "\\boxed{(B) or (C)}", "B and C and D and A",
        "'B' or 'C'", '"B", "C"', "**B** or **C**", "*B*/*C*", "`B`, `C`", "B·C", "B • C",
        "B，C", "B、C", "B＋C", "B\u2003C", "B\u200bC", "B; C; D", "B plus C", "B… C",
        "one of (B), (C)", "(B) with (C) as second choice", "(B) 60%, (C) 40%", "(B) over (C)",
        "(B). If that is wrong, (C).",
    ]),
    "numbers": ("docmath", "5", "The answer is @", [
        "5 dozen", "5 scores", "5 myriad", "5 grand", "5 hundredths", "5 fold", "5 squared",
        "5 thousandths", "5 per thousand", "5 ppm", "5 ppt", "5 o/oo", "5 pct",
        "5 basis points", "5 percent less", "5 percent lower", "5% down", "5 outflow",
        "5 outflows", "5 deficits", "5 negative", "5 red", "5 in losses", "5 less", "5 fewer",
        "5 owed", "5 short", "5 off", "5ish", "5 approx", "5 give or take", "5 plus", "5 minus",
        "5 or", "5, perhaps", "5 (or 6)", "5/6", "5:6", "5;6", "5 6", "5|6", "~5~", "x != 5",
        "x ≠ 5", "x <> 5", "x >= 5", "x =/ 5", "x =\\= 5", "x =/=5", "x \\ne 5", "x not = 5",
        "x isn't = 5", "x is not = 5", "x ==! 5", "5 = x or 6", "=/= 5", "/= 5", "<= 5", "≥5",
        "at least 5", "at most 5", "up to 5", "over 5", "under 5", "more than 5",
        "less than 5", "not 5", "hardly 5", "no 5", "5 no", "5 not", "5 false", "±5", "+/-5",
        "-+5", "--5", "(-)5", "- 5", "–5", "—5", "— 5", "−5", "minus 5", "5-", "5 -", "5.5.5",
        "5e1", "5 thousand", "5K", "$5K", "$5k", "$5 million", "5 cents", "¢5", "5 k", "$5 b",
        "5 mn", "$5 hundred", "5 years ago", "5 days late", "5 times", "5 half",
        "5 years or more", "5 and up", "5 at least", "5 quarters", "5 in", "5 for 2",
        "5 loss per share", "5 below", "5 percent of a half", "5 percent of half", "5 of 6",
        "5 out of 6", "5 to 1", "5 to one", "5 a dozen",
    ]),
    "years": ("docmath", "2020", "The answer is @", [
        "2021", "2018", "2019", "2022", "2,021", "2020.5", "2017.5", "2022.9", "FY 2021",
        "$2,021", "2.021 thousand", "2021/1", "20.21e2", "2021 years", "2020 or 2021",
        "2020-2021", "2020/21",
    ]),
    "values as text": ("musique", "5", "The answer is @", [
        "- 5", "–5", "— 5", "-  5", "-$5", "-€5", "$-5", "(-5)", "-(5)", "5%", "5 %", "5\\%",
        "5 percent", "5‰", "5 pct", "<5", "> 5", "=<5", "=>5", "≥5", "~5", "≈5", "±5", "+/-5",
        "-+5", "!5", "!=5", "≠5", "=/=5", "/=5", "5?", "5+", "5-", "5²", "5^2", "5e", "5x",
        "5/2", "1/5", "5.0.", "5:0", "5 or", "5k", "5K", "$5k", "x=5", "#5?", "No. 5", "5th",
        "0.5", ".5", "−5", "﹣5", "－5", "⁻5", "‐5", "‒5", "5 0", "+-5", "—5", "\\neq 5",
        "\\pm 5", "\\sqrt{5}", "$<5$", "5 < x", "x < 5",
    ]),
    "decimals as text": ("musique", "1.5", "The answer is @", [
        "15", "1,5", "1.50.", "1 5", "-1.5", "- 1.5", "1.5%", "1.5 %", "<1.5", "1.5+", "1.5k",
        "11.5", "1.5.1",
    ]),
    "marks as text": ("musique", "C", "The answer is @", [
        "C+", "C++", "C#", "C-", "!C", "~C", "<C", "C?",
    ]),
    "titles": ("musique", "Dr. Martin Luther King Jr.", "The answer is @", [
        "Luther King Jr.", "King Jr.", "Dr. King", "Sir Martin Luther King Jr.",
        "Martin Luther King Sr.", "Dr. Dr. Martin Luther King Jr.", "Mr. Martin Luther King",
    ]),
    "one word": ("toy_docqa", "cocoa", "@", [
        "The answer is cocoa?", "The answer is cocoa or tea.", "The answer is cocoa. tea.",
        "The answer is ~cocoa", "The answer is !cocoa", "The answer is not cocoa",
        "The answer is (cocoa)\n(tea)", "The answer is <cocoa", "The answer is cocoa, no.",
        "It's not that the answer is cocoa.",
    ]),
}  # fmt: skip

# The rule gives 1 for each.
RIGHT = {
    "a name": ("musique", "Paris", [
        "The answer is Paris.", "Therefore, the answer is \\boxed{\\text{Paris}}.",
        "The answer is:\n\n**Paris**", "I think the answer is Paris.",
        "So, I conclude that the answer is Paris.", "I am sure the answer is Paris.",
        "There is no doubt that the answer is Paris.", "I'd say the answer is Paris.",
        "It is safe to say that the answer is Paris.",
        "Based on the passage, the answer is Paris.",
        "As London is not mentioned, the answer is Paris.", "It is true that the answer is Paris.",
        "London was not involved. Therefore, the answer is Paris.",
        "London was never the place and the answer is Paris.",
        "If we combine both documents, the answer is Paris.",
        "Although it could be London at first sight, the answer is Paris.",
        "**Not London.** The answer is Paris.",
        "The answer is Paris.\n\nExplanation: the treaty was signed there in 1783.",
        "The answer is Paris.\nThis is supported by document 2, which says so.",
        "The answer is Paris.\nThe answer can be found in document 2.",
        "The final answer is: $\\boxed{Paris}$",
        "The final answer is: $\\boxed{\\text{Paris}}$. I hope it is correct.",
        "The answer is **Paris**.\n\nLet me know if you have questions!",
        "The answer is (Paris). Document 3 states that it could not be signed in London.",
        "\\boxed{Paris}", "**Answer:** \\boxed{Paris}", "Answer: $\\boxed{\\text{Paris}}$",
        "$$\\boxed{Paris}$$", "So the city is \\boxed{Paris}.", "Hence: \\boxed{Paris}.",
        "### Final answer\n\n\\boxed{Paris}", "The city is not London.\n\n\\boxed{Paris}",
        "1. It is not London.\n2. It is Paris.\n\n\\boxed{Paris}",
        "The answer is \\boxed{Paris}.\n\nNote: the first document does not give a date.",
        "The answer is Paris.\n\nReferences: [1] Treaty.", "The answer is Paris\n",
        "The answer is \"Paris\".\n\nThe treaty ended the war, but it took effect later.",
        "The answer is Paris.\n\nThe text says that Paris, not London, was the place.",
    ]),
    "a letter": ("long_toc_choices", "B", [
        "The correct answer is (B).", "The correct answer is B",
        "The correct answer is **B. seller**", "The correct answer is (B) seller, who may sue.",
        "The correct answer is (B) The seller or the buyer may sue.",
        "The correct answer is (B) Section 3(a) applies.", "The correct answer is B. U.S. law",
        "The correct answer is (B) Only if the buyer agrees",
        "The correct answer is (B) $5 million", "The correct answer is (B) It is the seller.",
        "The correct answer is (B): the seller is liable and cannot sue.",
        "The correct answer is B\n\nOption A and C are not supported.",
        "The correct answer is (B).\n\nReasoning: (A) and (C) are contradicted by section 1.",
        "The correct answer is (B) all of the above.", "The correct answer is \\boxed{B}",
        "The correct answer is $\\boxed{\\text{B}}$.",
        "The correct answer is: B. A seller of goods.",
        "The correct answer is (B) He did not pay.", "The correct answer is (B) neither party.",
        "The correct answer is (B) None of them.",
        "The correct answer is (B) Both the buyer and the seller",
        "The correct answer is (B) Exhibit A, as amended",
        "The correct answer is Option (B): Yes, but only in part.",
        "The correct answer is (B) The policy may be terminated by the insured.",
        "The correct answer is (B).\n\nExplanation: The passage says that the seller bears the "
        "cost. Options A, C and D are incorrect because the contract does not mention them.",
        "The correct answer is (B) seller.\n\nHere's why:\n\n- Option A: The buyer does not pay, "
        "so this is incorrect.\n- Option C: Both is not supported.\n- Option D: Neither is wrong.",
        "The correct answer is (B): The seller, as stated in Section 12.3 (c).",
        "The correct answer is (B) because the seller bears the cost.",
        "The correct answer is B because the seller pays.",
        "The correct answer is (B) as the seller bears the cost.",
        "After analysis, it is clear that the correct answer is (B).",
        "Based on the above, I believe the correct answer is (B).",
        "The other options are not supported. Therefore, the correct answer is (B).",
        "Since options A, C, and D are not mentioned, the correct answer is (B).",
        "While A is plausible, it is not supported. So the correct answer is (B) seller.",
        "Therefore, the correct answer is:\n\n**(B) seller**",
        "Therefore, the correct answer is $\\boxed{\\text{(B) seller}}$",
        "The correct answer is (B) \"The seller shall not be liable\".",
        "The correct answer is (B) Yes, or else the contract ends.",
        "The correct answer is (B) 30 days or more", "The correct answer is (B) Plan A and Plan B",
        "The correct answer is (B) It was not disclosed.",
        "The correct answer is (B) The risk may be shared",
    ]),
    "a word": ("toy_docqa", "cocoa", [
        "Therefore, the answer is cocoa.", "The answer is **cocoa**.",
        "The keeper does not like tea, so the answer is cocoa.",
        "The answer is cocoa\n\nThe document says: \"The keeper likes cocoa, not tea.\"",
    ]),
    "a number": ("docmath", "5", [
        "The answer is 5 %", "The answer is x = 5", "The answer is the total = 5",
        "The answer is = 5", "The answer is \\$5", "The answer is $5$ years",
        "The answer is 5 shares", "The answer is about 5", "The answer is ~5",
        "To find it, we compute 10 / 2 = 5.\n\nTherefore, the answer is 5.",
        "The total is not given directly, but 2 + 3 = 5. Therefore, the answer is 5.",
        "$$\n\\text{Average} = \\frac{10}{2} = \\boxed{5}\n$$", "So it is \\(\\boxed{5}\\).",
        "Thus the value is approximately $\\boxed{5.00}$.",
    ]),
}  # fmt: skip


def rule(source: str, gold: str, final: str) -> float:
    return score_response(
        data_source=source,
        ground_truth=gold,
        response_text=f"x</think>\n\n{final}",
        reasoning_open=True,
    ).rule


@pytest.mark.parametrize("kind", WRONG)
def test_no_neighbour_of_a_wrong_answer_is_rewarded(kind):
    source, gold, template, parts = WRONG[kind]
    finals = [template.replace("@", part) for part in parts]
    assert [final for final in finals if rule(source, gold, final)] == []


@pytest.mark.parametrize("kind", RIGHT)
def test_plain_right_answers_are_rewarded(kind):
    source, gold, finals = RIGHT[kind]
    assert [final for final in finals if not rule(source, gold, final)] == []


@pytest.mark.parametrize(
    "lead",
    ["It can be inferred", "It appears", "I am confident in saying", "This leads to the conclusion",
     "The passage tells us", "The text says", "So we get", "We can now say",
     "The evidence supports", "It should be noted"],
)  # fmt: skip
def test_a_that_clause_states_its_answer_unless_others_say_it(lead: str) -> None:
    response = f"{lead} that the answer is (Paris)."
    assert score_response(
        data_source="musique", ground_truth="Paris", response_text=response, reasoning_open=False
    ).value


@pytest.mark.parametrize(
    ("gold", "stated"),
    [
        ("D", "(D) Both A and B"),
        ("D", "(D) Neither (A) nor (B)."),
        ("B", "(B) The author could not be sure."),
        ("B", "(B) It is wrong."),
    ],
)
def test_an_options_own_text_takes_nothing_back(gold: str, stated: str) -> None:
    response = f"The correct answer is {stated}"
    assert score_response(
        data_source="long_toc_choices",
        ground_truth=gold,
        response_text=response,
        reasoning_open=False,
    ).value


@pytest.mark.parametrize("behind", [
    "Actually founded in 250 BC.", "It may be noted that the city was founded earlier.",
    "Either way, the text supports it.", "Sorry for the long explanation.",
    "Edit distance is low.", "There may be other cities in France.",
])  # fmt: skip
def test_harmless_words_behind_an_answer_leave_it(behind: str) -> None:
    response = f"Therefore, the answer is (Paris). {behind}"
    assert score_response(
        data_source="musique", ground_truth="Paris", response_text=response, reasoning_open=False
    ).value
