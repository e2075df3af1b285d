"""Scored groups -> groups with advantages, as the loss sees them."""

from collections.abc import Sequence

import numpy as np

from megatron_qlrl.advantage.group import Kind, group_advantages
from megatron_qlrl.advantage.shaping import shaped_rewards
from megatron_qlrl.types import ScoredGroup, TrainGroup, TrainResponse


def with_advantages(
    groups: Sequence[ScoredGroup], *, kind: Kind, max_tokens: int, buffer_tokens: int | None
) -> list[TrainGroup]:
    """Groups with the advantages of their rewards, which are shaped by length if there is a
    buffer (`shaped_rewards`). Responses without a verdict are left out."""
    train_groups: list[TrainGroup] = []
    for group in groups:
        rewards = group.rewards
        if buffer_tokens is not None:
            lengths = np.array([len(r.token_ids) for r in group.rollouts])
            rewards = shaped_rewards(
                rewards, lengths, max_tokens=max_tokens, buffer_tokens=buffer_tokens
            )
        old = group.old_logprobs or [None] * len(group.rollouts)
        parts = zip(group.rollouts, group_advantages(rewards, kind), old, group.scores, strict=True)
        responses = tuple(
            TrainResponse(rollout.token_ids, float(advantage), rollout.engine_logprobs, logprobs)
            for rollout, advantage, logprobs, score in parts
            if score.value is not None
        )
        train_groups.append(TrainGroup(group.prompt.token_ids, responses))
    return train_groups
