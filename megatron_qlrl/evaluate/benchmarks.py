"""Held-out accuracy: the same engine and the same scorer as training."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_qlrl.types import Prompt, ScoredGroup

# Scored groups of all prompts, in order, the same on every rank.
Rollout = Callable[[Sequence[Prompt]], list[ScoredGroup]]


def evaluate(benchmarks: Mapping[str, Sequence[Prompt]], rollout: Rollout) -> dict[str, float]:
    """Metrics `val/<benchmark>/score` (mean over prompts of the mean over verdicts),
    `.../masked` (responses without a verdict), `.../response_length`, `.../unfinished`, and
    `val/score`, the mean over benchmarks. Where there is no verdict at all there is no score.
    """
    metrics: dict[str, float] = {}
    scores = []
    for name, prompts in benchmarks.items():
        groups = rollout(prompts)
        rollouts = [r for g in groups for r in g.rollouts]
        rewards = [g.rewards for g in groups]
        means = [r[~np.isnan(r)].mean() for r in rewards if not np.isnan(r).all()]
        found = {
            "masked": sum(np.isnan(r).sum() for r in rewards),
            "response_length": np.mean([len(r.token_ids) for r in rollouts]),
            "unfinished": np.mean([not r.finished for r in rollouts]),
        }
        if means:
            scores.append(np.mean(means))
            found = {"score": scores[-1], **found}
        metrics |= {f"val/{name}/{key}": float(value) for key, value in found.items()}
    if scores:
        metrics["val/score"] = float(np.mean(scores))
    return metrics
