"""A run that learns nothing says so: the share, an example, what was looked for, what helps."""

import numpy as np
import pytest

from megatron_qlrl.reward.diagnose import BatchWatch, diagnosis, shortened
from megatron_qlrl.reward.score import score_response
from megatron_qlrl.types import Prompt, Rollout, ScoredGroup

RIGHT = "Therefore, the answer is (misc)."
WRONG = "Therefore, the answer is (utils)."
SILENT = "I would look it up."


def batch(
    *responses: str, finished: bool = True, reasoning_open: bool = False
) -> list[ScoredGroup]:
    """One group of these responses to one prompt, scored by the rule of its source."""
    prompt = Prompt("f:0", np.zeros(5, np.int32), "debian_musique", "Which section?", "misc",
                    reasoning_open=reasoning_open)  # fmt: skip
    rollouts = tuple(
        Rollout("f:0", k, np.zeros(3, np.int32), np.zeros(3, np.float32), text, finished, 0)
        for k, text in enumerate(responses)
    )
    scores = tuple(
        score_response(
            data_source="debian_musique",
            ground_truth="misc",
            response_text=text,
            reasoning_open=reasoning_open,
        )
        for text in responses
    )
    return [ScoredGroup(prompt, rollouts, scores)]


def warnings_of(batches: list[list[ScoredGroup]]) -> list[str]:
    said: list[str] = []
    watch = BatchWatch(said.append)
    for step, groups in enumerate(batches):
        watch.observe(step, groups)
    return said


@pytest.mark.parametrize(
    ("groups", "parts"),
    [
        (
            batch(*[SILENT] * 10),
            [
                "10 of 10 responses have no readable answer",
                '"the answer is"',
                "I would look",
                "sft",
            ],
        ),
        (
            batch(*[WRONG] * 10),
            ["10 of 10 responses score 0", "read 'utils', the gold is 'misc'", "ground_truth"],
        ),
        (
            batch(*[RIGHT] * 10, finished=False),
            ["10 of 10 responses are cut", "raise rollout.max_response_tokens"],
        ),
        (
            batch(*[RIGHT] * 10, reasoning_open=True),
            ["10 of 10 responses never close their reasoning", "after </think>", "chat template"],
        ),
    ],
)
def test_each_problem_is_said_with_its_example_and_its_cure(groups, parts) -> None:
    (said,) = warnings_of([groups])
    assert said == f"step 0: {diagnosis(groups)}"
    for part in parts:
        assert part in said


def test_at_nine_of_ten_nothing_is_said() -> None:
    assert diagnosis(batch(RIGHT, *[SILENT] * 9)) == ""
    assert diagnosis(batch(RIGHT, *[SILENT] * 10)) != ""
    assert diagnosis([]) == ""


def test_the_first_batch_counts_alone_and_later_ones_only_together() -> None:
    good, bad = batch(RIGHT), batch(SILENT)
    assert warnings_of([good, bad, bad, bad, bad]) == []
    (said,) = warnings_of([good, bad, bad, bad, bad, bad])
    assert said.startswith("steps 1-5: 5 of 5 responses have no readable answer")


def test_one_warning_until_the_problem_was_gone() -> None:
    good, bad = batch(RIGHT), batch(SILENT)
    assert len(warnings_of([bad] * 20)) == 1
    assert len(warnings_of([bad] * 6 + [good] * 5 + [bad] * 5)) == 2
    assert len(warnings_of([bad, [], [], bad, bad, bad, bad])) == 1  # steps without groups


def test_long_examples_are_shortened_at_both_ends() -> None:
    assert shortened("ab", 6) == "ab"
    assert shortened("abcdefghij", 6) == "ab [...] ghij"
