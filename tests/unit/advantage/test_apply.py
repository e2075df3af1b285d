"""Scored groups with their advantages, by hand."""

import numpy as np
import pytest

from megatron_qlrl.advantage.apply import with_advantages
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup


def scored(*values: float | None) -> ScoredGroup:
    """Response k has k + 1 tokens, all of them k."""
    rollouts = tuple(
        Rollout("b", k, np.full(k + 1, k, np.int32), np.full(k + 1, -0.5, np.float32), "", True, 0)
        for k in range(len(values))
    )
    prompt = Prompt("b", np.arange(4, dtype=np.int32), "docqa", "?", "!")
    return ScoredGroup(prompt, rollouts, tuple(Score(v, v or 0.0) for v in values))


def test_samples_without_verdict_are_left_out() -> None:
    group = scored(None, 1.0, 0.0, None, 0.5)
    (kept,) = with_advantages([group], kind="dr_grpo", max_tokens=9, buffer_tokens=None)
    assert kept.prompt_ids is group.prompt.token_ids
    assert [r.token_ids.tolist() for r in kept.responses] == [[1, 1], [2, 2, 2], [4] * 5]
    assert [r.advantage for r in kept.responses] == [0.5, -0.5, 0.0]
    for response, k in zip(kept.responses, (1, 2, 4), strict=True):
        assert response.engine_logprobs is group.rollouts[k].engine_logprobs
        assert response.old_logprobs is None


def test_advantages_see_the_shaped_rewards() -> None:
    """A buffer of 2 before 4 tokens: the responses of 3 and 4 tokens lose 0.5 and 1."""
    group = scored(1.0, 1.0, 1.0, 1.0)
    (shaped,) = with_advantages([group], kind="dr_grpo", max_tokens=4, buffer_tokens=2)
    want = [1 - 0.625, 1 - 0.625, 0.5 - 0.625, 0 - 0.625]
    assert [r.advantage for r in shaped.responses] == pytest.approx(want)
