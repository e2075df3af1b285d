"""Rewards and lengths of rollouts, worked out by hand."""

import numpy as np
import pytest

from megatron_qlrl.metrics.rollouts import (
    engine_metrics,
    judge_metrics,
    part_metrics,
    rollout_metrics,
    rollout_records,
)
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup


def prompt(uid: str, num_tokens: int = 3, source: str = "docqa") -> Prompt:
    return Prompt(uid, np.arange(num_tokens, dtype=np.int32), source, "?", "!")


def scored(of: Prompt, *values: float | None, finished: bool = True) -> ScoredGroup:
    """Response k has k + 1 tokens, all of them k."""
    rollouts = tuple(
        Rollout(
            of.uid,
            k,
            np.full(k + 1, k, np.int32),
            np.full(k + 1, -0.5, np.float32),
            "",
            finished,
            0,
        )
        for k in range(len(values))
    )
    return ScoredGroup(of, rollouts, tuple(Score(v, v or 0.0) for v in values))


def test_rollout_metrics_by_hand() -> None:
    groups = [scored(prompt("a", 3), 1.0, None), scored(prompt("b", 7), 0.0, finished=False)]
    assert rollout_metrics(groups) == pytest.approx(
        {
            "critic/rewards/mean": 0.5,
            "critic/rewards/max": 1.0,
            "critic/rewards/min": 0.0,
            "critic/rewards/masked": 1.0,
            "reward/rule/mean": 1 / 3,
            "reward/rule/no_answer": 1.0,
            "response_length/mean": 4 / 3,  # 1, 2, 1 tokens
            "response_length/max": 2.0,
            "response_length/min": 1.0,
            "response_length/clip_ratio": 1 / 3,
            "prompt_length/mean": 5.0,
            "prompt_length/max": 7.0,
            "batch/groups": 2.0,
        }
    )


def test_mean_reward_without_any_verdict_is_not_zero() -> None:
    metrics = rollout_metrics([scored(prompt("a"), None)])
    assert np.isnan(metrics["critic/rewards/mean"])


def test_a_step_that_generated_nothing_says_so() -> None:
    assert rollout_metrics([]) == {"batch/groups": 0.0}


def test_sources_apart() -> None:
    groups = [
        scored(prompt("a"), 1.0, 0.0),
        scored(prompt("b", source="math"), 1.0, finished=False),
        scored(prompt("c"), None),
    ]
    assert part_metrics(groups, "source", [g.prompt.data_source for g in groups]) == {
        "source/docqa/critic/rewards/mean": 0.5,
        "source/docqa/response_length/mean": 4 / 3,
        "source/docqa/response_length/clip_ratio": 0.0,
        "source/docqa/batch/groups": 2.0,
        "source/math/critic/rewards/mean": 1.0,
        "source/math/response_length/mean": 1.0,
        "source/math/response_length/clip_ratio": 1.0,
        "source/math/batch/groups": 1.0,
    }
    assert part_metrics([], "source", []) == {}


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
    assert judge_metrics([{}, {}]) == {}  # no judge


def test_speed_of_an_engine_is_tokens_of_all_over_seconds_of_all() -> None:
    one = {"prefill_tokens": 100.0, "prefill_s": 2.0, "decode_tokens": 30.0, "decode_s": 1.0}
    two = {"prefill_tokens": 50.0, "prefill_s": 1.0, "decode_tokens": 0.0, "decode_s": 0.5}
    speed = {"perf/prefill_tokens_per_s": 50.0, "perf/decode_tokens_per_s": 20.0}
    assert engine_metrics([one, two]) == speed
    assert engine_metrics([dict.fromkeys(one, 0.0)]) == {}


def test_records_have_the_end_of_the_prompt() -> None:
    of = Prompt("a", np.arange(3, dtype=np.int32), "docqa", "?", "!", end="</text> <b>?")
    (record,) = rollout_records([scored(of, 1.0)])
    assert (record["prompt_end"], record["question"]) == ("</text> <b>?", "?")
