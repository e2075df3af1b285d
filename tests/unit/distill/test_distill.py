"""The journal, the collection and the selection of distilled samples; the teacher is a function
by hand."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_qlrl.distill.distill import GIVE_UP_AFTER, collect, select
from megatron_qlrl.distill.journal import Journal, Sample
from megatron_qlrl.distill.teacher import fit_reasoning, read_answer
from megatron_qlrl.errors import DataError
from megatron_qlrl.reward.score import Scorer
from megatron_qlrl.reward.verdict import NoVerdict
from megatron_qlrl.types import Prompt

RIGHT = "so\n</think>\n\nTherefore, the answer is Paris."


def prompts_of(num: int) -> list[Prompt]:
    return [
        Prompt(f"f:{n}", np.zeros(10, np.int32), "musique", "Which city?", "Paris")
        for n in range(num)
    ]


def open_journal(folder: Path, **settings: Any) -> Journal:
    return Journal(folder / "j.jsonl", {"temperature": 1.0} | settings)


def run(journal: Journal, ask: Any, *, prompts: int, samples: int, concurrency: int = 3) -> int:
    return asyncio.run(
        collect(prompts_of(prompts), ask, journal, samples=samples, concurrency=concurrency)
    )


def test_each_sample_is_asked_once_and_only_what_is_missing(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    async def ask(number: int, sample: int) -> Sample | None:
        asked.append((number, sample))
        await asyncio.sleep(0)
        return None if (number, sample) == (1, 0) else Sample(f"f:{number}", sample, "x", True)

    journal = open_journal(tmp_path)
    assert run(journal, ask, prompts=2, samples=2) == 1
    journal.close()
    assert sorted(asked) == [(0, 0), (0, 1), (1, 0), (1, 1)]

    with (tmp_path / "j.jsonl").open("a") as torn:
        torn.write('{"uid": "f:1", "sample": 0, "resp')
    asked.clear()
    journal = open_journal(tmp_path)
    assert sorted(journal.samples) == [("f:0", 0), ("f:0", 1), ("f:1", 1)]
    run(journal, ask, prompts=2, samples=3)
    journal.close()
    assert sorted(asked) == [(0, 2), (1, 0), (1, 2)]
    lines = (tmp_path / "j.jsonl").read_text().splitlines()
    assert [json.loads(line).get("uid") for line in lines[:4]] == [None, "f:0", "f:0", "f:1"]


def test_a_teacher_that_is_gone_ends_it_with_what_there_is(tmp_path: Path) -> None:
    async def ask(number: int, sample: int) -> Sample | None:
        return Sample("f:0", 0, "x", True) if number == 0 else None

    journal = open_journal(tmp_path)
    with pytest.raises(DataError, match=rf"{GIVE_UP_AFTER} times in a row; 1 of 40 samples"):
        run(journal, ask, prompts=40, samples=1, concurrency=1)
    assert list(journal.samples) == [("f:0", 0)]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    open_journal(tmp_path).close()
    with pytest.raises(DataError, match="begun with other settings"):
        open_journal(tmp_path, temperature=0.5)


SAMPLE_OF_A_NUMBER = '{"uid": 7, "sample": 0, "response": "x", "finished": true}'


@pytest.mark.parametrize(
    "damage", ["{}", "[1]", "not json", SAMPLE_OF_A_NUMBER, "[" * 100_000, "\x85", ""]
)
def test_a_line_that_is_no_sample_is_named(tmp_path: Path, damage: str) -> None:
    open_journal(tmp_path).close()
    with (tmp_path / "j.jsonl").open("a") as file:
        file.write(damage + "\n")
    with pytest.raises(DataError, match=r"j\.jsonl, line 2 cannot be used: .* take the line out"):
        open_journal(tmp_path)


@pytest.mark.parametrize("content", ["a file of something else", '{"a": 1}\nand its torn end'])
def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    (tmp_path / "j.jsonl").write_text(content)
    with pytest.raises(DataError, match="begun with other settings"):
        open_journal(tmp_path)
    assert (tmp_path / "j.jsonl").read_text() == content


def test_kept_are_whole_correct_short_and_new_answers(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    answers = [
        [(RIGHT, True), (RIGHT + " ", True), (RIGHT, False), ("no answer", True)],
        [(RIGHT, True), (RIGHT + " " * 200, True), ("</think>the answer is Rome", True)],
        [(RIGHT, True)],
    ]
    for number, several in reversed(list(enumerate(answers))):  # in any order
        for k, (text, finished) in enumerate(several):
            journal.add(Sample(f"f:{number}", k, text, finished))
    rows = [{"prompt": [{"role": "user", "content": c}], "n": c} for c in ("a", "b", "a")]
    kept, counts = select(
        prompts_of(3), rows, journal, Scorer(None), num_tokens=len, max_tokens=100
    )
    assert kept == [{**rows[0], "response": RIGHT}, {**rows[1], "response": RIGHT}]
    assert counts == {
        "musique": {"kept": 2, "duplicate": 2, "cut_off": 1, "wrong": 2, "too_long": 1}
    }


@pytest.mark.parametrize(("above", "right"), [(0.0, ["p\na", "p\nabc"]), (0.7, ["p\nabc"])])
def test_partial_credit_is_right_above_the_threshold(
    tmp_path: Path, above: float, right: list[str]
) -> None:
    """The rule `recite` gives difflib's ratio: 2 * 2 / (2 + 4) of "\\na" and "\\nabc"."""
    journal = open_journal(tmp_path)
    for k, text in enumerate(["x\nabc", "p\na", "p\nabc"]):
        journal.add(Sample("f:0", k, text, True))
    prompt = replace(prompts_of(1)[0], data_source="mrcr", ground_truth="p\n\nabc")
    prompt = replace(prompt, reasoning_open=False)
    rows = [{"prompt": [{"role": "user", "content": "a"}]}]
    kept, _ = select(
        [prompt],
        rows,
        journal,
        Scorer(None),
        num_tokens=len,
        max_tokens=100,
        solved_above=above,
    )
    assert [row["response"] for row in kept] == right


def test_an_answer_that_leaves_the_students_reasoning_open_is_counted_as_such(
    tmp_path: Path,
) -> None:
    journal = open_journal(tmp_path)
    journal.add(Sample("f:0", 0, "Therefore, the answer is Paris.", True))
    prompt = replace(prompts_of(1)[0], reasoning_open=True)
    kept, counts = select(
        [prompt], [{"prompt": []}], journal, Scorer(None), num_tokens=len, max_tokens=100
    )
    assert (kept, counts) == ([], {"musique": {"open_reasoning": 1}})


@pytest.mark.parametrize(
    ("response", "reasoning_open", "expected"),
    [
        ("<think>\nso</think>x", True, "so</think>x"),
        ("so</think>x", True, "so</think>x"),
        ("<think>\nso</think>x", False, "<think>\nso</think>x"),
        ("so</think>x", False, "<think>\nso</think>x"),
        ("x", False, "x"),
    ],
)
def test_a_teachers_reasoning_is_fitted_to_the_students_template(
    response: str, reasoning_open: bool, expected: str
) -> None:
    assert fit_reasoning(response, reasoning_open=reasoning_open) == expected


def body(message: dict[str, Any], finish: str = "stop") -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode()


def test_answers_of_servers_that_part_the_reasoning_and_of_others() -> None:
    assert read_answer(body({"content": "x</think>y"})) == ("x</think>y", True)
    assert read_answer(body({"content": "x"}, "length")) == ("x", False)
    parted = {"content": "\n\nthe answer is 3", "reasoning_content": "\nso it is\n"}
    assert read_answer(body(parted)) == ("so it is\n</think>\n\nthe answer is 3", True)
    only = {"content": None, "reasoning": "cut in the"}
    assert read_answer(body(only, "length")) == ("cut in the\n</think>\n\n", False)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"{}",
        b"[]",
        b'{"choices": []}',
        body({"content": 3}),
        b"[" * 100_000,
        body({"content": "a \ud800"}),
    ],
)
def test_what_is_no_completion_is_no_answer(reply: bytes) -> None:
    with pytest.raises(NoVerdict):
        read_answer(reply)
