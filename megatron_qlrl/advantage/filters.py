"""Which groups carry a gradient (the filter of DAPO's dynamic sampling, arXiv 2503.14476)."""

import numpy as np


def has_spread(rewards: np.ndarray) -> bool:
    """True when at least two responses got different verdicts; NaN is no verdict.

    Without spread every group-relative advantage is 0.
    """
    judged = rewards[np.isfinite(rewards)]
    return bool(judged.size) and bool(np.ptp(judged) > 0)
