"""Held-out accuracy: the same engine and the same scorer as training."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_qlrl.types import Prompt, ScoredGroup

# Scored groups of all prompts, in order, the same on every rank.
Rollout = Callable[[Sequence[Prompt]], list[ScoredGroup]]


def evaluate(benchmarks: Mapping[str, Sequence[Prompt]], rollout: Rollout) -> dict[str, float]:
    """Metrics `val/<benchmark>/score` (mean over prompts of the mean over samples),
    `.../response_length`, `.../unfinished`, and `val/score`, the mean over benchmarks."""
    metrics: dict[str, float] = {}
    for name, prompts in benchmarks.items():
        groups = rollout(prompts)
        rollouts = [r for g in groups for r in g.rollouts]
        metrics[f"val/{name}/score"] = float(np.mean([np.nanmean(g.rewards) for g in groups]))
        metrics[f"val/{name}/response_length"] = float(
            np.mean([len(r.token_ids) for r in rollouts])
        )
        metrics[f"val/{name}/unfinished"] = float(np.mean([not r.finished for r in rollouts]))
    scores = [metrics[f"val/{name}/score"] for name in benchmarks]
    if scores:
        metrics["val/score"] = float(np.mean(scores))
    return metrics
