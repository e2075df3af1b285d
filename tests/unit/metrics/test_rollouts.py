"""Rewards and lengths of rollouts, worked out by hand."""

import numpy as np
import pytest

from megatron_qlrl.metrics.rollouts import (
    custom_metrics,
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


def engine_counts(**some: float) -> dict[str, float]:
    names = (
        "prefill_tokens", "prefill_s", "decode_tokens", "decode_s", "generate_s", "prompt_tokens",
        "cached_tokens", "sibling_tokens", "sibling_cached_tokens", "preemptions", "sync_s",
        "sync_bytes",
    )  # fmt: skip
    return dict.fromkeys(names, 0.0) | some


def test_what_the_engines_did_by_hand() -> None:
    one = engine_counts(
        prefill_tokens=100, prefill_s=2, decode_tokens=30, decode_s=1, generate_s=3.5,
        prompt_tokens=160, cached_tokens=60, sibling_tokens=80, sibling_cached_tokens=60,
        preemptions=2, sync_s=0.2, sync_bytes=64,
    )  # fmt: skip
    two = engine_counts(
        prefill_tokens=50, prefill_s=1, decode_s=0.5, generate_s=1, prompt_tokens=90,
        cached_tokens=40, preemptions=1, sync_s=0.3, sync_bytes=32,
    )  # fmt: skip
    # The second rank does not lead its engine.
    assert engine_metrics([one, {}, two], gen_s=4.0) == pytest.approx(
        {
            "perf/prefill_tokens_per_s": 150 / 3,
            "perf/decode_tokens_per_s": 30 / 1.5,
            "perf/engine/prefill_s/mean": 1.5,
            "perf/engine/prefill_s/max": 2,
            "perf/engine/decode_s/mean": 0.75,
            "perf/engine/decode_s/max": 1,
            "perf/engine/prefill_tokens/sum": 150,
            "perf/engine/decode_tokens/sum": 30,
            "perf/engine/preemptions/sum": 3,
            "perf/engine/cached_share": 100 / 250,
            "perf/engine/sibling_cached_share": 60 / 80,
            "perf/engine/idle_share/mean": (0.5 / 4 + 3 / 4) / 2,
            "perf/engine/idle_share/max": 0.75,
            "perf/engine/slowest": 0,
            "perf/engine/sync_s/max": 0.3,
            "perf/engine/sync_bytes/max": 64,
        }
    )


def test_engines_that_read_nothing_have_no_rates() -> None:
    metrics = engine_metrics([engine_counts()], gen_s=1.0)
    assert not [name for name in metrics if name.endswith(("per_s", "_share"))]
    assert metrics["perf/engine/idle_share/mean"] == 1.0


def test_records_have_the_end_of_the_prompt() -> None:
    of = Prompt("a", np.arange(3, dtype=np.int32), "docqa", "?", "!", end="</text> <b>?")
    (record,) = rollout_records([scored(of, 1.0)])
    assert (record["prompt_end"], record["question"]) == ("</text> <b>?", "?")


def test_own_rewards_are_counted_over_all_ranks() -> None:
    names = ("asked", "no_verdict", "raised", "invalid", "timeout", "crashed", "seconds")
    one = dict(zip(names, (6, 1, 2, 0, 0, 0, 1.5), strict=True))
    two = dict(zip(names, (2, 0, 0, 1, 1, 0, 0.5), strict=True))
    assert custom_metrics([one, two]) == {
        "reward/custom/asked": 8,
        "reward/custom/no_verdict": 1,
        "reward/custom/raised": 2,
        "reward/custom/invalid": 1,
        "reward/custom/timeout": 1,
        "reward/custom/crashed": 0,
        "reward/custom/latency_s": 0.25,
    }
    assert custom_metrics([dict.fromkeys(names, 0.0)])["reward/custom/latency_s"] == 0
    assert custom_metrics([{}, {}]) == {}
