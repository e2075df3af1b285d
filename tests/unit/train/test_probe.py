"""What the probe says of engines whose answers are made by hand."""

import numpy as np
import pytest

from megatron_qlrl.train.probe import _Checked, _Expected, _judge, _median
from megatron_qlrl.types import ProbeAnswer

IDS = np.arange(6, dtype=np.int32)
RIGHT = np.array([-1.0, -2.0, -3.0, -4.0, -5.0])
"""The prompt has 4 tokens: three log-probs are those of the prefill, two of the decode."""
NOISE = 0.01


def checked(*logprobs: np.ndarray, right: np.ndarray = RIGHT, version: int = 7) -> _Checked:
    answers = [ProbeAnswer(IDS, x.astype(np.float32), num_prompt=4) for x in logprobs]
    return _Checked(version, answers, [_Expected(right, NOISE)] * len(answers))


def test_errors_are_in_units_of_the_noise_and_the_worst_engine_counts() -> None:
    one = RIGHT + [0.01, -0.01, 0.01, 0.03, 0.03]
    two = RIGHT + [0.0, 0.0, 0.02 * 3**0.5, 0.0, 0.0]
    problem, metrics = _judge(checked(one, two), None)
    assert problem == ""
    assert metrics == pytest.approx(
        {"training/probe_prefill_error": 2.0, "training/probe_decode_error": 3.0}, rel=1e-4
    )


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ([0.09, 0.09, -0.09, 0.0, 0.0], "prefill"),
        ([0.0, 0.0, 0.0, 0.09, 0.09], "decode"),
        ([0.0, np.nan, 0.0, 0.0, 0.0], "prefill"),
    ],
)
def test_more_than_rounding_names_the_engine(errors: list[float], kind: str) -> None:
    problem, _ = _judge(checked(RIGHT, RIGHT + errors), None)
    assert problem.startswith(f"engine 1 does not have the trainer's weights: by {kind}, ")
    assert _judge(checked(RIGHT, RIGHT + np.multiply(errors, 0.8)), None)[0] == (
        problem if np.isnan(errors).any() else ""
    )


def test_a_token_with_another_expert_does_not_move_the_median() -> None:
    flipped = RIGHT + [0.01, 0.5, 0.01, 0.01, 0.01]
    problem, metrics = _judge(checked(flipped), None, _median)
    assert problem == ""
    assert metrics["training/probe_prefill_error"] == pytest.approx(1.0, rel=1e-4)
    assert _judge(checked(RIGHT + 0.1), None, _median)[0].startswith("engine 0 does not have")


def test_an_engine_that_stands_still_is_stale_though_within_the_noise() -> None:
    right = RIGHT + [0.01, 0.0, 0.01, 0.0, 0.0]  # an update has moved two of the prefill's three
    stale, fresh = RIGHT, RIGHT + [0.0, 0.001, 0.0, 0.0, 0.0]
    last = checked(RIGHT, RIGHT)
    problem, _ = _judge(checked(fresh, stale, right=right, version=8), last)
    assert problem.startswith("engine 1 has kept its old weights: ")
    assert "version 7" in problem
    assert _judge(checked(fresh, fresh, right=right, version=8), last)[0] == ""
    # The same weights again, and an update that the trainer's own rounding nearly hides.
    assert _judge(checked(stale, stale, right=right, version=7), last)[0] == ""
    hidden = RIGHT + [0.01, 0.0, 0.0, 0.0, 0.0]
    assert _judge(checked(stale, stale, right=hidden, version=8), last)[0] == ""


def test_a_policy_that_has_diverged_is_not_the_engines_fault() -> None:
    assert _judge(checked(RIGHT, right=RIGHT * np.nan), None) == ("", {})
