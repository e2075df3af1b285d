"""Words around an answer: which take it back, and which leave it standing."""

import time

import pytest

from megatron_qlrl.reward.doubt import denied_before, is_hedged, taken_back
from megatron_qlrl.reward.extract import Answer, find_answer


@pytest.mark.parametrize(
    "before",
    [
        "it is false that",
        "It's not true that",
        "It is, as you see, wrong, however one reads it, that",
        "I don’t think",
        "nobody believes",
        "I refuse to say",
        "If",
        "unless",
        "It is a myth that",
        "Some say",
        "Let's say",
        "I am not sure, but",
        "Perhaps,",
        "My guess:",
        "It is far from certain that",
        "**It cannot be** that",
        "I do not think\n",
        "I can't say, having read it all, that",
    ],
)
def test_these_leads_deny_or_doubt(before):
    assert denied_before(before + " ", starts_sentence=False)


@pytest.mark.parametrize(
    "before",
    [
        "",
        "Therefore, ",
        "So ",
        "In short: ",
        "I think ",
        "I am sure that ",
        "It is clear that ",
        "We conclude that ",
        "There is no doubt that ",
        "It is not London, so ",
        "Since it is not London, ",
        "It is not London. Hence ",
        "**Not London.** ",
        "It is not London\n\n",
        "London was never named, and ",
    ],
)
def test_these_leads_state_an_answer(before):
    assert not denied_before(before, starts_sentence=False)


def test_a_capital_begins_a_sentence_below_a_line_that_denies():
    assert denied_before("What is not reported\n", starts_sentence=False)
    assert not denied_before("What is not reported\n", starts_sentence=True)


@pytest.mark.parametrize(
    "behind",
    [
        "Wait, no.",
        "no, London",
        "Oh wait, it is London",
        ". It could also be London.",
        "\n\n**Actually**, London.",
        "I am not entirely sure.",
        "I'm not certain.",
        "I don't know.",
        "Or London.",
        "London is also possible.",
        "Perhaps London.",
        "I was wrong.",
        "That is wrong.",
        "The answer isn't that.",
        "It is not Paris.",
        "Paris is incorrect.",
        "(London) is correct.",
        "Final answer: London",
        "The real answer is in London.",
        "I changed my mind.",
        "Let me rethink this.",
        "x " * 3000 + "Wait, no.",
    ],
)
def test_these_words_take_the_answer_back(behind):
    assert taken_back(behind, "Paris")


@pytest.mark.parametrize(
    "behind",
    [
        "",
        ".",
        "**",
        "The treaty was not signed in London.",
        "No other city is named.",
        "It is the capital of France.",
        "The document shows that Paris was chosen.",
        "This is correct.",
        "Answer: Paris",
        "**Final answer:** (Paris).",
        "The treaty ended the war, but it took effect later.",
        "I hope it is correct.",
        "Note that London does not appear in the text.",
    ],
)
def test_these_words_leave_the_answer(behind):
    assert not taken_back(behind, "Paris")


@pytest.mark.parametrize(
    ("behind", "expected"),
    [
        ("(A) is wrong.", True),
        ("Option A is not right.", True),
        ("A buyer is not liable.", False),
        ("(B) is wrong.", False),
        ("(B) is right.", True),
    ],
)
def test_a_letter_is_no_article_of_the_explanation(behind, expected):
    assert taken_back(behind, "A") is expected


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("Paris", "Paris", False),
        ("Paris?", "Paris", True),
        ("Who's there?", "Who's there?", False),
        ("Paris, maybe", "Paris", True),
        ("maybe he drowned", "He may have drowned", False),
        ("it could also be London", "Paris", True),
    ],
)
def test_a_hedge_that_the_gold_does_not_share(prediction, gold, expected):
    assert is_hedged(prediction, gold) is expected


@pytest.mark.parametrize(
    ("final", "text"),
    [
        ("the answer is not \\boxed{Paris}.", "not Paris"),
        ("the answer is $-\\boxed{5}$", "$- 5"),
        ("the answer is \\boxed{5} million dollars", "5 million dollars"),
        ("the answer is $\\boxed{5}\\%$", "5 %"),
        ("\\boxed{A} or \\boxed{B}", "A  or B"),
        ("\\boxed{Paris}, Texas.", "Paris , Texas"),
        ("the answer is London, \\boxed{Paris}", "London, Paris"),
        ("the answer is \\boxed{Paris}\nLondon", "Paris \nLondon"),
        ("the answer is (Paris). Or London.", "(Paris). Or London"),
        ("the answer is Paris.\nWait, no: London.", "Paris. Wait, no: London"),
    ],
)
def test_a_doubted_answer_is_read_with_the_words_that_doubt_it(final, text):
    """So neither the rule nor the judge can take it for the bare answer."""
    answer = find_answer(final)
    assert answer is not None
    assert " ".join(answer.text.split()) == " ".join(text.split())


@pytest.mark.parametrize(
    "final",
    [
        "the answer is \\boxed{Paris}",
        "the answer is:\n\n\\[\n\\boxed{\\text{Paris}}\n\\]",
        "the final answer is: $\\boxed{Paris}$. I hope it is correct.",
        "It is not London. So we take \\boxed{Paris}, because the text says so.",
        "It is not London.\n\n\\boxed{Paris}",
        "the answer is $x = \\boxed{Paris}$.",
    ],
)
def test_a_box_stands_alone(final):
    assert find_answer(final) == Answer("Paris", "boxed")


_RUNS = (
    " ",
    "\n",
    "(",
    "*",
    ". ",
    "no ",
    "a",
    "that ",
    "\\boxed{",
    ", ",
    "not",
    "5 ",
    "\u200b",
    "\\",
)


@pytest.mark.parametrize("run", _RUNS)
def test_long_runs_are_read_in_linear_time(run):
    """A quadratic search takes minutes here; a second is generous for a busy machine's CPU time."""
    giant = run * (500_000 // len(run))
    start = time.process_time()
    for final in (
        f"the answer is (Paris).{giant} London",
        f"{giant} the answer is Paris",
        f"the answer is {giant} \\boxed{{Paris}} {giant}",
    ):
        find_answer(final)
    assert time.process_time() - start < 3
