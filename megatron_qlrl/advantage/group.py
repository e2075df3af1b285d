"""Group-relative advantages: what one response earned beside its siblings."""

from collections.abc import Callable
from typing import Literal

import numpy as np

Kind = Literal["grpo", "dr_grpo", "rloo"]

_EPS = 1e-6


def group_advantages(rewards: np.ndarray, kind: Kind) -> np.ndarray:
    """Advantages (float64 [G]) of the G responses to one prompt.

    - grpo: (r - mean) / (std + 1e-6), std unbiased (n - 1); DeepSeekMath, arXiv 2402.03300.
    - dr_grpo: r - mean; arXiv 2503.20783.
    - rloo: r minus the mean of the others; arXiv 2402.14740.

    Args:
        rewards: [G]; NaN means "no verdict": the response takes no part in the statistics and
            its advantage is 0. With fewer than two verdicts there is nothing to compare with,
            and every advantage is 0.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    assert rewards.ndim == 1, rewards.shape
    judged = np.isfinite(rewards)
    advantages = np.zeros_like(rewards)
    if judged.sum() >= 2:
        advantages[judged] = _KINDS[kind](rewards[judged])
    return advantages


def _grpo(rewards: np.ndarray) -> np.ndarray:
    return _dr_grpo(rewards) / (rewards.std(ddof=1) + _EPS)


def _dr_grpo(rewards: np.ndarray) -> np.ndarray:
    # The mean of equal floats can be off by one ulp, which grpo would divide by 1e-6.
    if np.ptp(rewards) == 0:
        return np.zeros_like(rewards)
    return rewards - rewards.mean()


def _rloo(rewards: np.ndarray) -> np.ndarray:
    return _dr_grpo(rewards) * (len(rewards) / (len(rewards) - 1))


_KINDS: dict[Kind, Callable[[np.ndarray], np.ndarray]] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
}
