"""Scored groups -> groups with advantages, as the loss sees them."""

from collections.abc import Callable, Sequence

import numpy as np

from megatron_qlrl.advantage.group import Deviation, Kind, group_advantages, shared_deviations
from megatron_qlrl.advantage.shaping import shaped_rewards
from megatron_qlrl.types import Prompt, ScoredGroup, TrainGroup, TrainResponse


def with_advantages(
    groups: Sequence[ScoredGroup],
    *,
    kind: Kind,
    deviation: Deviation,
    task_of: Callable[[Prompt], str],
    max_tokens: int,
    buffer_tokens: int | None,
) -> list[TrainGroup]:
    """Groups with the advantages of their rewards, which are shaped by length if there is a
    buffer (`shaped_rewards`). Responses without a verdict are left out.

    Args:
        groups: the whole training batch.
        deviation: over what grpo's standard deviation is taken; tasks are those of `task_of`.
    """
    rewards = [_shaped(group, max_tokens, buffer_tokens) for group in groups]
    stds: Sequence[float | None] = [None] * len(groups)
    if deviation != "group":
        parts = [task_of(g.prompt) if deviation == "task" else "" for g in groups]
        stds = shared_deviations(rewards, parts)
    return [
        _train_group(group, group_advantages(own, kind, std=std))
        for group, own, std in zip(groups, rewards, stds, strict=True)
    ]


def _shaped(group: ScoredGroup, max_tokens: int, buffer_tokens: int | None) -> np.ndarray:
    if buffer_tokens is None:
        return group.rewards
    lengths = np.array([len(r.token_ids) for r in group.rollouts])
    return shaped_rewards(
        group.rewards, lengths, max_tokens=max_tokens, buffer_tokens=buffer_tokens
    )


def _train_group(group: ScoredGroup, advantages: np.ndarray) -> TrainGroup:
    old = group.old_logprobs or [None] * len(group.rollouts)
    parts = zip(group.rollouts, advantages, old, group.scores, strict=True)
    responses = tuple(
        TrainResponse(rollout.token_ids, float(advantage), rollout.engine_logprobs, logprobs)
        for rollout, advantage, logprobs, score in parts
        if score.value is not None
    )
    return TrainGroup(group.prompt.token_ids, responses)
