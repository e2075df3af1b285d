"""What a step's rollouts look like: rewards and lengths, over all and by source."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_qlrl.types import Rollout, ScoredGroup

PART_METRICS = (
    "critic/rewards/mean",
    "response_length/mean",
    "response_length/clip_ratio",
    "batch/groups",
)


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Rewards and lengths of a step's groups under verl's names; of none of them their number."""
    if not groups:
        return {"batch/groups": 0.0}
    rollouts: list[Rollout] = [r for g in groups for r in g.rollouts]
    rewards = np.concatenate([g.rewards for g in groups])
    verdicts = rewards[~np.isnan(rewards)]
    lengths = np.array([len(r.token_ids) for r in rollouts])
    prompts = np.array([g.prompt.num_tokens for g in groups])
    scores = [s for g in groups for s in g.scores]
    metrics: dict[str, Any] = {
        "critic/rewards/mean": verdicts.mean() if verdicts.size else np.nan,
        "critic/rewards/max": verdicts.max() if verdicts.size else np.nan,
        "critic/rewards/min": verdicts.min() if verdicts.size else np.nan,
        "critic/rewards/masked": float(np.isnan(rewards).sum()),
        "reward/rule/mean": np.mean([s.rule for s in scores]),
        "reward/rule/no_answer": np.mean([not s.matched for s in scores]),
        "response_length/mean": lengths.mean(),
        "response_length/max": lengths.max(),
        "response_length/min": lengths.min(),
        "response_length/clip_ratio": np.mean([not r.finished for r in rollouts]),
        "prompt_length/mean": prompts.mean(),
        "prompt_length/max": prompts.max(),
        "batch/groups": len(groups),
    }
    return {name: float(value) for name, value in metrics.items()}


def part_metrics(
    groups: Sequence[ScoredGroup], prefix: str, part: Callable[[ScoredGroup], str]
) -> dict[str, float]:
    """The same of each part's groups alone, as `<prefix>/<part>/<name>`. Data sources have names
    of the user's, so what is divided otherwise needs a prefix of its own."""
    found: dict[str, float] = {}
    for name in sorted({part(g) for g in groups}):
        metrics = rollout_metrics([g for g in groups if part(g) == name])
        found |= {f"{prefix}/{name}/{key}": metrics[key] for key in PART_METRICS}
    return found
