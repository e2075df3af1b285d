import pytest

from megatron_qlrl.reward.extract import (
    MAX_ANSWER_CHARS,
    Answer,
    final_text,
    find_answer,
    parse_choice,
)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think> b", " b"),
        ("a</think> b </think>c", "c"),
        ("a</think>", ""),
        ("<think>the answer is 5", None),
        ("a</think> b <think> c", None),
        ("", None),
        ("Therefore, the answer is Paris.", None),
    ],
)
def test_only_the_text_after_the_last_closing_tag_counts(response, expected):
    assert final_text(response, reasoning_open=True) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Therefore, the answer is Paris.", "Therefore, the answer is Paris."),
        ("", ""),
        ("<think>a</think> b", " b"),
        ("a</think> b </think>c", "c"),
        ("<think>the answer is 5", None),
        ("a</think> b <think> c", None),
        ("the answer is 5 <think>", None),
    ],
)
def test_without_open_reasoning_the_whole_response_counts(response, expected):
    assert final_text(response, reasoning_open=False) == expected


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
        ("the answer is (Paris). London.", "(Paris). London"),
        ("the answer is (Paris). [London]", "(Paris). [London]"),
        ("the answer is Paris.\nMore text.", "Paris"),
        ("the answer is Paris\n\nMore text", "Paris"),
        ("the answer is **Paris.**\nMore text", "Paris"),
        ("the answer is\nParis\nRome", "Paris\nRome"),
        ("the answer is:\n- Paris\n- Rome", "- Paris\n- Rome"),
        ("the answer is (B)\nbecause (A) is wrong", "B"),
        ("the answer is (A)\n(B)", "(A)\n(B)"),
        ("the answer is (A) (B)", "(A) (B)"),
        ("the answer is ((5))", "(5)"),
        ("the answer is \\((5)\\)", "5"),
        ("the answer is （Ｂ）．", "B"),
        ("the answer is １２３．５", "123.5"),
        ("the answer is Pa\u200bris\u200f\x00", "Paris"),
        ("the ans\u200bwer is Paris", "Paris"),
        ("the answer is 5²", "5²"),
        ("I know that the answer is Paris", "Paris"),
        ("As it is not stated, the answer is no", "no"),
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
        ("first \\boxed{1}. Then \\boxed{2}", "2"),
        ("\\boxed{1} but the answer is $\\boxed{3}$", "3"),
    ],
)
def test_answer_in_a_box(final, text):
    assert find_answer(final) == Answer(text, "boxed")


@pytest.mark.parametrize(
    "final",
    ["I don't think the answer is Paris", "I am not sure that the answer is Paris"]
    + ["If the answer is Paris", "I doubt the answer is Paris", "whether that the answer is 5"]
    + [
        "",
        "Paris",
        "the answer isn't Paris",
        "bathe answer is 5",
        "the answer is",
        "the answer is .",
    ]
    + ["the answer is 5. In short, the answer is:", "\\boxed{}", "\\boxed{42"],
)
def test_no_answer_is_stated(final):
    assert find_answer(final) is None


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
        ("B\nBecause it is so", "B"),
        ("B. John F. Kennedy", "B"),
        ("A. Paris B. London", None),
        ("A\nB", None),
        ("A, I think B", None),
        ("A; maybe B", None),
        ("(A) and also B", None),
        ("B, as I said", "B"),
        ("B. Exhibit A", "B"),
        ("(B) Exhibit A", "B"),
        ("(A) is wrong", None),
        ("A\nB\nC", None),
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


@pytest.mark.parametrize(
    "filler", ["a", "(", "\\boxed{", "the answer is ", " ", "\n", "*", "$", "["]
)
def test_a_statement_over_the_bound_is_left_as_it_is(filler):
    giant = f"the answer is Paris {filler * (1_000_000 // len(filler))} Rome"
    answer = find_answer(giant)
    assert answer is None or len(answer.text) > MAX_ANSWER_CHARS or answer.text in ("Rome", "Paris")


@pytest.mark.parametrize(("length", "text"), [(998, "a" * 998), (999, f"({'a' * 999})")])
def test_wrappers_stay_around_a_statement_over_the_bound(length, text):
    assert find_answer(f"the answer is ({'a' * length})") == Answer(text, "the answer is")
