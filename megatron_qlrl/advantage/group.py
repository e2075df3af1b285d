"""Group-relative advantages: what one response earned beside its siblings."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Kind = Literal["grpo", "dr_grpo", "rloo"]
Deviation = Literal["group", "batch", "task"]

_EPS = 1e-6


def group_advantages(rewards: np.ndarray, kind: Kind, *, std: float | None = None) -> np.ndarray:
    """Advantages (float64 [G]) of the G responses to one prompt.

    - grpo: (r - mean) / (std + 1e-6), std unbiased (n - 1); DeepSeekMath, arXiv 2402.03300.
    - dr_grpo: r - mean; arXiv 2503.20783.
    - rloo: r minus the mean of the others; arXiv 2402.14740.

    Args:
        rewards: [G]; NaN means "no verdict": the response takes no part in the statistics and
            its advantage is 0. With fewer than two verdicts there is nothing to compare with,
            and every advantage is 0.
        std: what grpo divides by; by default the group's own standard deviation.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    assert rewards.ndim == 1, rewards.shape
    judged = np.isfinite(rewards)
    advantages = np.zeros_like(rewards)
    if judged.sum() >= 2:
        own = rewards[judged]
        centered = _centered(own)
        if kind == "grpo":
            centered /= (own.std(ddof=1) if std is None else std) + _EPS
        elif kind == "rloo":
            centered *= len(own) / (len(own) - 1)
        advantages[judged] = centered
    return advantages


def _centered(rewards: np.ndarray) -> np.ndarray:
    # The mean of equal floats can be off by one ulp, which grpo would divide by 1e-6.
    if np.ptp(rewards) == 0:
        return np.zeros_like(rewards)
    return rewards - rewards.mean()


def shared_deviations(rewards: Sequence[np.ndarray], parts: Sequence[str]) -> list[float]:
    """Returns for each group the unbiased standard deviation of all rewards in its part of the
    batch (QwenLong-L1.5, arXiv 2512.12967: the part is the group's task).

    Rewards without a verdict (NaN) do not count. It is 0 with fewer than two rewards, or with equal
    ones; `group_advantages` is then 0 for every response of the part, whatever it divides by.

    Args:
        rewards: [G] of each group.
        parts: the part of each group.
    """
    members: dict[str, list[np.ndarray]] = {}
    for own, part in zip(rewards, parts, strict=True):
        members.setdefault(part, []).append(own[np.isfinite(own)])
    deviations = {part: _deviation(np.concatenate(every)) for part, every in members.items()}
    return [deviations[part] for part in parts]


def _deviation(rewards: np.ndarray) -> float:
    return float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0
