"""What holds for every text: no crash, the same verdict in every notation, no gain from noise."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qlrl.reward.expressions import evaluate
from megatron_qlrl.reward.extract import final_text, find_answer, parse_choice, unwrap
from megatron_qlrl.reward.numeric import Number, parse_number
from megatron_qlrl.reward.rules import RULE_OF_SOURCE
from megatron_qlrl.reward.score import score_response
from megatron_qlrl.reward.text import fold_width, normalize, strip_invisible

untimed = settings(deadline=None)  # the first expression starts a process

# Text made of the pieces that the parsers look for, so that hypothesis reaches their branches.
pieces = st.lists(
    st.sampled_from(
        ["the answer is", "The correct answer is", "\\boxed{", "}", "(", ")", "[", "]", "$", "$$"]
        + ["**", "\\text{", "\\[", "\\]", "</think>", "\n", " ", ".", ",", "-", "1", "5", "%"]
        + ["million", "A", "B", "or", "Paris", "e", "=", "'", '"', "\\%", "{,}", "ß", "İ", "٣"]
        + ["\\frac{", "^", "\\times", "/", "\u200b", "\u202e", "５", "（", "²", "<think>", "not"]
    ),
    max_size=30,
).map("".join)
# Lone surrogates too: a tokenizer may decode half a character.
any_text = st.one_of(st.text(), st.text(st.characters(categories=["Cs", "Cc", "Mn", "L"])), pieces)

words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)
_NO_CANDIDATES = frozenset("a an the it is was in on at not".split())
candidates = words.filter(lambda word: word not in _NO_CANDIDATES)
names = st.sampled_from(
    ["Paris", "Barack Obama", "AC/DC", "May 5, 1821", "C++", "Zürich", "trout and zinc", "-3.5"]
)
numbers = st.one_of(
    st.integers(-(10**12), 10**12).map(str),
    st.decimals(-(10**6), 10**6, places=3).map(lambda value: f"{value:f}"),
)
# mrcr reads no stated answer, and its score is a share.
sources = st.sampled_from(sorted(set(RULE_OF_SOURCE) - {"mrcr"}))

WRAPPINGS = (
    "{}", "{}.", "({})", "({}).", "[{}]", "**{}**", "**{}.**", "*{}*", "`{}`", '"{}"', "“{}”",
    "\n\n{}", "\\({}\\)", "\\[{}\\]", "${}$", "$${}$$", "\\text{{{}}}", "\\boxed{{{}}}",
    "$\\boxed{{{}}}$.", "\\boxed{{\\text{{{}}}}}", "({}). The text says so.", "{}\n\nMore text.",
    "{}.\nMore text.", "\u200b{}\u200f", "**({})**", "({})\nbecause", "{} \n",
)  # fmt: skip


def rule(source: str, gold: str, stated: str) -> float:
    response = f"reasoning</think>\n\nTherefore, the answer is {stated}"
    return score_response(
        data_source=source, ground_truth=gold, response_text=response, reasoning_open=True
    ).rule


@untimed
@given(any_text)
def test_any_text_is_survived(text):
    final = final_text(text, reasoning_open=False)
    assert final is None or text.endswith(final)
    answer = find_answer(text)
    assert answer is None or answer.text
    assert unwrap(text) in text
    number = parse_number(text)
    assert number is None or abs(number.value) < float("inf")
    letter = parse_choice(text)
    assert letter is None or (len(letter) == 1 and letter.lower() in text.lower())
    assert not strip_invisible(text) or set(strip_invisible(text)) <= set(text)
    assert fold_width(fold_width(text)) == fold_width(text)
    assert normalize(text) == " ".join(normalize(text).split())


@untimed
@given(pieces)
def test_any_expression_is_survived(text):
    value = evaluate(text)
    assert value is None or abs(value) < float("inf")


@untimed
@given(sources, any_text, any_text)
def test_any_gold_and_any_answer_give_a_verdict(source, gold, stated):
    assert rule(source, gold, stated) in (0.0, 1.0)


@untimed
@given(any_text, any_text)
def test_any_recitation_is_a_share(gold, text):
    assert 0.0 <= rule("mrcr", gold, text) <= 1.0
    score = score_response(
        data_source="mrcr", ground_truth=gold, response_text=text, reasoning_open=False
    )
    assert 0.0 <= score.rule <= 1.0


@untimed
@given(sources, any_text.filter(lambda text: text.strip()))
def test_an_empty_answer_is_never_right(source, gold):
    assert rule(source, gold, "") == 0.0


@untimed
@given(st.sampled_from(WRAPPINGS), names, names)
def test_wrappings_do_not_change_the_verdict_on_a_name(wrapping, gold, stated):
    assert rule("musique", gold, wrapping.format(stated)) == float(gold == stated)


@untimed
@given(st.sampled_from(WRAPPINGS), numbers, numbers)
def test_wrappings_do_not_change_the_verdict_on_a_number(wrapping, gold, stated):
    plain = rule("docmath", gold, stated)
    assert rule("docmath", gold, gold) == 1.0
    assert rule("docmath", gold, wrapping.format(stated)) == plain


@untimed
@given(st.sampled_from(WRAPPINGS), st.sampled_from("ABCDE"), st.sampled_from("ABCDE"))
def test_wrappings_do_not_change_the_verdict_on_a_letter(wrapping, gold, stated):
    assert rule("long_toc_choices", gold, wrapping.format(stated)) == float(gold == stated)


@untimed
@given(
    st.sampled_from(["{} {}", "{}, {}", "{} or {}", "{} and {}", "{}/{}", "{}; {}", "{}\n{}"]),
    st.permutations(["gold", "wrong"]),
    candidates,
    candidates,
)
def test_a_row_of_candidates_is_never_right(row, order, gold, wrong):
    if gold != wrong:
        stated = row.format(*({"gold": gold, "wrong": wrong}[name] for name in order))
        assert rule("musique", gold, stated) == 0.0


@untimed
@given(
    st.sampled_from(["musique", "docmath", "long_toc_choices", "toy_docqa"]),
    st.sampled_from(["Paris", "5", "-5", "A", "cocoa", "5.3%", "Yes"]),
    st.one_of(any_text, words, numbers),
    st.sampled_from(
        [" Berlin", ", Berlin", " or Berlin", " / 777", " and 777", " (C) (D)", "; no"]
    ),
)
def test_one_more_wrong_candidate_never_mends_an_answer(source, gold, stated, wrong):
    if rule(source, gold, stated) == 0.0:
        assert rule(source, gold, stated + wrong) == 0.0


@untimed
@given(names, any_text)
def test_nothing_counts_without_closed_reasoning(gold, text):
    response = text.replace("</think>", "") + f" Therefore, the answer is {gold}."
    score = score_response(
        data_source="musique", ground_truth=gold, response_text=response, reasoning_open=True
    )
    assert score.rule == 0.0


@untimed
@given(st.integers(-(10**12), 10**12))
def test_integers_survive_every_notation(value):
    plain = Number(float(value))
    for text in (f"{value}", f"{value:,}", f"${value}$", f"**{value:,}**", f"\\({value}\\)."):
        assert parse_number(text) == plain
    for text in (f"{value} dollars", f"x = {value:,}", f"{value:,}".replace(",", "{,}")):
        assert parse_number(text) == plain


@untimed
@given(st.decimals(-1000, 1000, places=3))
def test_percent_sign_is_reported_and_not_applied(value):
    for text in (f"{value}%", f"{value} percent", f"{value}\\%", f"${value}\\%$"):
        assert parse_number(text) == Number(float(value), percent=True)


@untimed
@given(st.decimals("0.001", 1000, places=3), st.sampled_from(["", "%", " million"]))
def test_the_sign_and_the_power_of_ten_count(value, form):
    gold = f"{value}{form}"
    assert rule("docmath", gold, gold) == 1.0
    assert rule("docmath", gold, f"-{gold}") == rule("docmath", f"-{gold}", gold) == 0.0
    for wrong in (value * 10, value / 10, value * 1000, value / 1000):
        assert rule("docmath", gold, f"{wrong:f}{form}") == 0.0
