"""Scored groups with their advantages, by hand."""

import math

import numpy as np
import pytest

from megatron_qlrl.advantage.apply import with_advantages
from megatron_qlrl.advantage.group import Deviation, Kind
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup, TrainGroup


def scored(*values: float | None, source: str = "docqa") -> ScoredGroup:
    """Response k has k + 1 tokens, all of them k."""
    rollouts = tuple(
        Rollout("b", k, np.full(k + 1, k, np.int32), np.full(k + 1, -0.5, np.float32), "", True, 0)
        for k in range(len(values))
    )
    prompt = Prompt("b", np.arange(4, dtype=np.int32), source, "?", "!")
    return ScoredGroup(prompt, rollouts, tuple(Score(v, v or 0.0) for v in values))


def advantages(
    *groups: ScoredGroup,
    kind: Kind = "dr_grpo",
    deviation: Deviation = "group",
    max_tokens: int = 9,
    buffer_tokens: int | None = None,
) -> list[TrainGroup]:
    return with_advantages(
        groups,
        kind=kind,
        deviation=deviation,
        task_of=lambda prompt: prompt.data_source,
        max_tokens=max_tokens,
        buffer_tokens=buffer_tokens,
    )


def test_samples_without_verdict_are_left_out() -> None:
    group = scored(None, 1.0, 0.0, None, 0.5)
    (kept,) = advantages(group)
    assert kept.prompt_ids is group.prompt.token_ids
    assert [r.token_ids.tolist() for r in kept.responses] == [[1, 1], [2, 2, 2], [4] * 5]
    assert [r.advantage for r in kept.responses] == [0.5, -0.5, 0.0]
    for response, k in zip(kept.responses, (1, 2, 4), strict=True):
        assert response.engine_logprobs is group.rollouts[k].engine_logprobs
        assert response.old_logprobs is None


def test_advantages_see_the_shaped_rewards() -> None:
    """A buffer of 2 before 4 tokens: the responses of 3 and 4 tokens lose 0.5 and 1."""
    group = scored(1.0, 1.0, 1.0, 1.0)
    (shaped,) = advantages(group, max_tokens=4, buffer_tokens=2)
    want = [1 - 0.625, 1 - 0.625, 0.5 - 0.625, 0 - 0.625]
    assert [r.advantage for r in shaped.responses] == pytest.approx(want)


def test_the_deviation_of_a_task_or_of_the_batch_by_hand() -> None:
    """Task a: rewards 1 0 0 0 (group mean 1/4) and 1 1 1 0 (3/4), without the one that has no
    verdict: 4 of 8 are 1, so the squares add up to 2 and std = sqrt(2 / 7). Task b: 1 0, std =
    sqrt(1 / 2). The batch: 5 of 10 are 1, std = sqrt(2.5 / 9)."""
    groups = [
        scored(1.0, 0.0, None, 0.0, 0.0, source="a"),
        scored(1.0, 0.0, source="b"),
        scored(1.0, 1.0, 1.0, 0.0, source="a"),
    ]
    for deviation, std_a, std_b in (
        ("task", math.sqrt(2 / 7), math.sqrt(1 / 2)),
        ("batch", math.sqrt(2.5 / 9), math.sqrt(2.5 / 9)),
    ):
        got = advantages(*groups, kind="grpo", deviation=deviation)
        a, b = std_a + 1e-6, std_b + 1e-6
        assert [r.advantage for g in got for r in g.responses] == pytest.approx(
            [
                *(0.75 / a, -0.25 / a, -0.25 / a, -0.25 / a),
                *(0.5 / b, -0.5 / b),
                *(0.25 / a, 0.25 / a, 0.25 / a, -0.75 / a),
            ],
            rel=1e-14,
        )


def test_a_task_of_one_sample_or_of_equal_ones_gives_no_gradient() -> None:
    """0.1 four times: the mean of equal floats may be off by an ulp, over a deviation of 1e-6."""
    groups = [
        scored(1.0, source="one"),
        scored(None, None, source="none"),
        scored(0.1, 0.1, source="equal"),
        scored(0.1, 0.1, source="equal"),
        scored(1.0, 0.0, source="other"),
    ]
    got = advantages(*groups, kind="grpo", deviation="task")
    zeros = [[0.0], [], [0.0, 0.0], [0.0, 0.0]]
    assert [[r.advantage for r in group.responses] for group in got[:4]] == zeros
    assert all(r.advantage for r in got[4].responses)
