"""When a batch without verdicts stops a run, and the judge's metrics over all ranks."""

import numpy as np
import pytest

from megatron_qlrl.compose.parts import check_masked, judge_metrics
from megatron_qlrl.errors import RewardError
from megatron_qlrl.types import Prompt, Score, ScoredGroup


def group(*values: float | None) -> ScoredGroup:
    prompt = Prompt("f:0", np.zeros(1, np.int32), "musique", "?", "!")
    return ScoredGroup(prompt, (), tuple(Score(v, v or 0.0) for v in values))


@pytest.mark.parametrize(
    ("share", "stops"), [(0.0, True), (0.24, True), (0.25, False), (1.0, False)]
)
def test_a_share_above_the_limit_stops(share: float, stops: bool) -> None:
    groups = [group(1.0, None, 0.0, 0.0), group(1.0, None, 1.0, 0.0)]
    if not stops:
        check_masked(groups, max_share=share, reason="")
        return
    with pytest.raises(RewardError, match=r"2 of 8 responses.*\(http://j: gone\).*resumes"):
        check_masked(groups, max_share=share, reason="http://j: gone")


def test_without_masked_samples_nothing_stops() -> None:
    check_masked([group(0.0, 0.0)], max_share=0.0, reason="")


def test_metrics_are_summed_over_ranks_and_latency_is_a_mean() -> None:
    names = ("asked", "cached", "yes", "failed", "replies", "latency_s")
    one = dict(zip(names, (8, 2, 3, 1, 5, 2.0), strict=True))
    two = dict(zip(names, (4, 0, 1, 0, 3, 0.4), strict=True))
    assert judge_metrics([one, two]) == pytest.approx(
        {
            "reward/judge/asked": 12,
            "reward/judge/cached": 2,
            "reward/judge/yes": 4,
            "reward/judge/failed": 1,
            "reward/judge/latency_s": 0.3,
        }
    )
    nothing = dict.fromkeys(names, 0.0)
    assert judge_metrics([nothing])["reward/judge/latency_s"] == 0
