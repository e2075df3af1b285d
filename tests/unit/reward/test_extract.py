import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_qlrl.reward.extract import (
    Answer,
    Number,
    final_text,
    find_answer,
    parse_choice,
    parse_number,
    unwrap,
)

# Text made of the pieces that the extractor looks for, so that hypothesis reaches its branches.
pieces = st.lists(
    st.sampled_from(
        ["the answer is", "The correct answer is", "\\boxed{", "}", "(", ")", "[", "]", "$", "$$"]
        + ["**", "\\text{", "\\[", "\\]", "</think>", "\n", " ", ".", ",", "-", "1", "5", "%"]
        + ["million", "A", "B", "or", "Paris", "e", "=", "'", '"', "\\%", "{,}", "ß", "İ", "٣"]
    ),
    max_size=30,
).map("".join)
any_text = st.one_of(st.text(), pieces)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think> b", " b"),
        ("a</think> b </think>c", "c"),
        ("a</think>", ""),
        ("<think>the answer is 5", None),
        ("", None),
    ],
)
def test_only_the_text_after_the_last_closing_tag_counts(response, expected):
    assert final_text(response) == expected


@pytest.mark.parametrize(
    ("final", "text"),
    [
        ("Therefore, the answer is Paris.", "Paris"),
        ("Therefore, the answer is (Paris).", "Paris"),
        ("**Therefore, the answer is (Paris).**", "Paris"),
        ("THE ANSWER IS: Paris", "Paris"),
        ("The **answer** is **Paris**!", "Paris"),
        ("__the answer is__ Paris", "Paris"),
        ('the answer is "Paris".', "Paris"),
        ("the answer is “Paris”", "Paris"),
        ("the answer is `Paris`", "Paris"),
        ("the final answer is Paris", "Paris"),
        ("the correct answer is (B).", "B"),
        ("the answer is $42$.", "42"),
        ("the answer is \\(42\\).", "42"),
        ("the answer is $$42$$", "42"),
        ("the answer is (1234)", "1234"),
        ("the answer is ($1,234).", "$1,234"),
        ("the answer is (Smith (the elder)).", "Smith (the elder)"),
        ("the answer is (Paris). The text says so.", "Paris"),
        ("the answer is (a) and (b)", "(a) and (b)"),
        ("the answer is (A). (B).", "(A). (B)"),
        ("the answer is Paris\nand more text", "Paris"),
        ("the answer is\n\nParis", "Paris"),
        ("the answer is Rome. No: the answer is Paris", "Paris"),
        ("the answer is .5", ".5"),
        ("the answer is -5", "-5"),
    ],
)
def test_answer_after_the_phrase(final, text):
    assert find_answer(final) == Answer(text, "the answer is")


@pytest.mark.parametrize(
    ("final", "text"),
    [
        ("\\boxed{42}", "42"),
        ("the answer is $\\boxed{42}$.", "42"),
        ("the answer is \\boxed{\\text{Paris}}", "Paris"),
        ("the answer is:\n\\[\n\\boxed{1{,}234}\n\\]", "1{,}234"),
        ("first \\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1} but the answer is $\\boxed{3}$", "3"),
    ],
)
def test_answer_in_a_box(final, text):
    assert find_answer(final) == Answer(text, "boxed")


@pytest.mark.parametrize(
    "final",
    ["", "Paris", "the answer isn't Paris", "bathe answer is 5", "the answer is", "the answer is ."]
    + ["the answer is 5. In short, the answer is:", "\\boxed{}", "\\boxed{42"],
)
def test_no_answer_is_stated(final):
    assert find_answer(final) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1234", 1234.0),
        ("1,234", 1234.0),
        ("1,234,567.5", 1234567.5),
        ("1{,}234", 1234.0),
        ("1,\\!234", 1234.0),
        ("(1234)", 1234.0),
        ("-32.4", -32.4),
        ("−32.4", -32.4),
        ("+5", 5.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("0", 0.0),
        ("$1,234.50", 1234.5),
        ("\\$5", 5.0),
        ("-$5", -5.0),
        ("$-5", -5.0),
        ("US$ 5", 5.0),
        ("€5", 5.0),
        ("1.5 million", 1.5e6),
        ("$1.5 billion", 1.5e9),
        ("2 thousand", 2000.0),
        ("$1.5 \\text{ million}$", 1.5e6),
        ("3 million dollars", 3e6),
        ("12 shares", 12.0),
        ("approximately 7.5", 7.5),
        ("x = 5", 5.0),
        ("10/2 = 5.0", 5.0),
        ("x \\approx 5.2", 5.2),
        ("1.5e3", 1500.0),
    ],
)
def test_plain_numbers(text, value):
    assert parse_number(text) == Number(pytest.approx(value, rel=1e-15), percent=False)


@pytest.mark.parametrize(
    "text", ["5.3%", "5.3 %", "5.3\\%", "$5.3\\%$", "5.3 percent", "5.3 per cent"]
)
def test_percentages(text):
    assert parse_number(text) == Number(5.3, percent=True)


@pytest.mark.parametrize(
    "text",
    ["", "abc", "5 or 6", "5, 6", "1,23", "12,34", "1,2345", "5 6", "--5", "-$-5", "5m", "5 m"]
    + ["5 hundred", "5 million thousand", "50 basis points", "50 cents", "1e999", "nan", "inf"]
    + ["0x10", "1_000", "5²", "٣", "1/2", "5 in 2019", "__import__('os')", "9" * 500],
)
def test_what_is_not_one_plain_number(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("(b)", "B"),
        ("[B]", "B"),
        ("B.", "B"),
        ("(B) Paris", "B"),
        ("B. Paris", "B"),
        ("B) Paris", "B"),
        ("B: a dog", "B"),
        ("B - Paris", "B"),
        ("A. A dog", "A"),
        ("option B", "B"),
        ("Option (B)", "B"),
        ("(A), as (A) says", "A"),
        ("", None),
        ("Paris", None),
        ("A dog", None),
        ("a dog", None),
        ("(AB)", None),
        ("A and B", None),
        ("A or B", None),
        ("A, B", None),
        ("A, B, C", None),
        ("A. B.", None),
        ("A) B)", None),
        ("A/B", None),
        ("(A) or (B)", None),
        ("(A), (B), (C)", None),
    ],
)
def test_one_letter_is_chosen(text, letter):
    assert parse_choice(text) == letter


@given(any_text)
def test_any_text_is_survived(text):
    final = final_text(text)
    assert final is None or text.endswith(final)
    answer = find_answer(text)
    assert answer is None or (answer.text and answer.text in text)
    assert unwrap(text) in text
    number = parse_number(text)
    assert number is None or abs(number.value) < float("inf")
    letter = parse_choice(text)
    assert letter is None or (len(letter) == 1 and letter.lower() in text.lower())


@given(st.integers(-(10**12), 10**12))
def test_integers_survive_every_notation(value):
    plain = Number(float(value), percent=False)
    for text in (f"{value}", f"{value:,}", f"(${value}$)", f"**{value:,}**", f"\\({value}\\)."):
        assert parse_number(text) == plain


@given(st.decimals(0, 1000, places=3))
def test_percent_sign_is_reported_and_not_applied(value):
    assert parse_number(f"{value}%") == Number(float(value), percent=True)
