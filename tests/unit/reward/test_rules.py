import pytest

from megatron_qlrl.errors import DataError
from megatron_qlrl.reward.extract import Answer
from megatron_qlrl.reward.rules import SourceRule, apply_rule, check_gold, rule_of
from megatron_qlrl.reward.score import score_response


def verdict(rule, gold, prediction):
    return apply_rule(rule, gold=gold, answer=Answer(prediction, "the answer is"))


@pytest.mark.parametrize(
    ("source", "rule", "judged"),
    [
        ("docmath_0_20000", "numeric", True),
        ("DocMath", "numeric", True),
        ("long_toc_choices_40000_plus", "choice", False),
        ("multihoprag_0_20000", "qa", True),
        ("musique_20000_40000", "qa", True),
        ("toy_docqa_needle", "exact", False),
        ("2wikimultihopqa", "qa", True),
        ("narrativeqa", "qa", True),
        ("hotpotqa", "qa", True),
        ("qasper", "qa", True),
        ("frames", "qa", True),
    ],
)
def test_source_selects_the_rule_and_whether_a_judge_may_be_asked(source, rule, judged):
    assert rule_of(source) == SourceRule(rule, judged)


def test_unknown_source_lists_the_valid_names():
    with pytest.raises(DataError, match="'gsm8k' has no rule.*multihoprag, musique.*docmath"):
        rule_of("gsm8k")


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("Yes", "yes."),
        ("Paris", "in Paris"),
        ("Paris", "It is Paris"),
        ("1994", "It was in 1994"),
        ("Barack Obama", "President Barack Obama"),
        ("The answer is Paris.", "Paris"),
        ("Therefore, the answer is (Barack Obama).", "barack obama"),
        ("AC/DC", "AC/DC"),
        ("trout and zinc", "trout and zinc"),
        ("either red or blue", "Either red, or blue"),
        ("Barack Obama", "it was former president Barack Obama"),
        ("no", "No"),
        ("not reported", "It was not reported"),
        ("1,234", "1234"),
        ("Ｐａ\u200bｒｉｓ", "Paris"),
        ("A", "a"),
        ("?", "?"),
    ],
)
def test_qa_right(gold, prediction):
    assert verdict("qa", gold, prediction)


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("Yes", "e"),
        ("Yes", "the"),
        ("Yes", "Y"),
        ("Yes", "yesterday"),
        ("Yes", "Yes or No"),
        ("Yes", "Yes/No"),
        ("Yes", "yes no"),
        ("No", "Yes no"),
        ("Paris", "not Paris"),
        ("Paris", "Paris or London"),
        ("Paris", "Paris London"),
        ("Paris", "Paris, London"),
        ("London", "Paris London"),
        ("Paris", "Paris, France"),
        ("Paris", "Paris London Rome"),
        ("Paris", "the city of Paris"),
        ("Arthur", "King Arthur"),
        ("queen", "king queen"),
        ("Martin Luther", "Martin Luther King"),
        ("BBB+", "BBB-"),
        ("C", "C++"),
        ("32", "3:2"),
        ("5", ".5"),
        ("5", "5%"),
        ("1015", "10-15"),
        ("Paris", "London, Paris, Rome"),
        ("Paris", "Paris; London"),
        ("Paris", "London and Paris"),
        ("Paris", "one two three Paris"),
        ("trout", "trout eel salmon herring"),
        ("Barack Obama", "Obama"),
        ("Barack Obama", "Obama Barack"),
        ("5", "-5"),
        ("5", "1.5"),
        ("15", "1.5"),
        ("art", "party"),
        ("?", "!"),
        ("", ""),
        ("", "the"),
    ],
)
def test_qa_wrong(gold, prediction):
    assert not verdict("qa", gold, prediction)


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("32.4", "32.4"),
        ("1000", "1001.5"),
        ("1000", "998.5"),
        ("32.4", "32.4486"),
        ("3", "2.9955"),
        ("-1000", "-1001.5"),
        ("0", "0.00"),
        ("1,234", "$1234"),
        ("5.3", "5.3%"),
        ("0.053", "5.3%"),
        ("5.3%", "5.3"),
        ("5.3%", "0.053"),
        ("5.3%", "5.3 percent"),
        ("1500000", "1.5 million"),
        ("1.5 million", "1,500,000"),
        ("Therefore, the answer is 32.4.", "32.4"),
        ("(32.4)", "32.4"),
        ("not disclosed", "Not disclosed."),
        ("0.75", "3/4"),
        ("0.75", "\\frac{3}{4}"),
        ("\\dfrac{3}{4}", "0.75"),
        ("3000000", "3 \\times 10^6"),
    ],
)
def test_numeric_right(gold, prediction):
    assert verdict("numeric", gold, prediction)


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("32.4", "-32.4"),
        ("-32.4", "32.4"),
        ("32.4", "324000"),
        ("32.4", "0.324"),
        ("32.4", "3.24"),
        ("32.4", "32.4 million"),
        ("1000", "1001.6"),
        ("1000", "998.4"),
        ("0", "0.001"),
        ("5", "0.05"),
        ("0.05", "5"),
        ("5.3%", "530%"),
        ("5.3%", "0.053%"),
        ("5", "5 or 6"),
        ("5", "5%, 6%"),
        ("-1", "5 - 6"),
        ("-1", "5 \\times 1 - 6"),
        ("5", "\\frac{5}{0}"),
        ("5", "five"),
        ("not disclosed", "5"),
        ("?", "!"),
        ("", ""),
    ],
)
def test_numeric_wrong(gold, prediction):
    assert not verdict("numeric", gold, prediction)


@pytest.mark.parametrize(
    ("gold", "prediction", "expected"),
    [
        ("B", "(B)", True),
        ("(B)", "b", True),
        ("The correct answer is (B)", "B. Paris", True),
        ("(B) Paris", "B", True),
        ("Paris", "paris.", True),
        ("B", "C", False),
        ("B", "(A) or (B)", False),
        ("B", "Paris", False),
        ("Paris", "B", False),
        ("", "B", False),
        ("", "", False),
    ],
)
def test_choice(gold, prediction, expected):
    assert verdict("choice", gold, prediction) is expected


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("cocoa", True), ("The Cocoa.", True), ("lemonade. in the cocoa", False), ("", False)],
)
def test_exact_takes_no_second_word(prediction: str, right: bool) -> None:
    response = f"I looked.\n</think>\n\nTherefore, the answer is {prediction}"
    score = score_response(
        data_source="toy_docqa_needle",
        ground_truth="cocoa",
        response_text=response,
        reasoning_open=True,
    )
    assert score.value == float(right)


@pytest.mark.parametrize(("length", "right"), [(1000, True), (1001, False)])
def test_an_answer_over_the_bound_is_never_right(length, right):
    assert verdict("qa", "x" * length, "x" * length) is right


RECITED = "x9Ab\nabcd"


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("x9Ababcd", 1.0),
        ("\n\nx9Ababcd\n", 1.0),
        ("x9Ababxx", 0.5),  # "ab" of 4 + 4 characters: 2 * 2 / 8
        ("x9Abcd", 2 / 3),  # 2 * 2 / 6
        ("x9Ab", 0.0),
        ("abcd", 0.0),
        ("Sure: x9Ababcd", 0.0),
        ("X9aBabcd", 0.0),
        ("The answer is x9Ababcd", 0.0),
        ("<think>x9Ababcd", 0.0),
        ("<think>hm</think>\n\nx9Ababcd", 1.0),
        ("", 0.0),
    ],
)
def test_recite_is_the_ratio_behind_the_prefix(response, value):
    score = score_response(
        data_source="mrcr", ground_truth=RECITED, response_text=response, reasoning_open=False
    )
    assert score.value == score.rule == pytest.approx(value)


def test_recite_needs_prefix_and_text():
    check_gold("mrcr", RECITED)
    for gold in ("", "x9Ab", "\nabcd", "x9Ab\n"):
        with pytest.raises(DataError, match="must be the line that a response starts with"):
            check_gold("mrcr", gold)
