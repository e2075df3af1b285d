"""Soft overlong punishment (DAPO, arXiv 2503.14476, Eq. 13): long answers cost before they are
cut. The advantage sees the shaped reward; which groups are kept is decided on the raw one."""

import numpy as np


def shaped_rewards(
    rewards: np.ndarray, num_tokens: np.ndarray, *, max_tokens: int, buffer_tokens: int
) -> np.ndarray:
    """Rewards (float64 [G]) less a length penalty; "no verdict" (NaN) stays NaN.

    The penalty is 0 up to max_tokens - buffer_tokens, grows linearly over the buffer, and is 1
    from max_tokens on.

    Args:
        rewards: [G], raw.
        num_tokens: int [G], response lengths.
    """
    into_buffer = (np.asarray(num_tokens) - (max_tokens - buffer_tokens)) / buffer_tokens
    return np.asarray(rewards, dtype=np.float64) - np.clip(into_buffer, 0.0, 1.0)
