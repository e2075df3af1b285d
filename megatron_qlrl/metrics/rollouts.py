"""What a step's rollouts look like: rewards and lengths, over all and by source; what engine and
judge did; and the records of the rollout log."""

from collections.abc import Mapping, Sequence
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
    """Rewards and lengths of a step's groups under verl's names; without groups only their
    number, 0."""
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
    groups: Sequence[ScoredGroup], prefix: str, parts: Sequence[str]
) -> dict[str, float]:
    """`PART_METRICS` of each part's groups, as `<prefix>/<part>/<name>`; `parts` names the part of
    each group. The user names the data sources, so every other division needs a prefix of its
    own."""
    metrics: dict[str, float] = {}
    for name in sorted(set(parts)):
        own = rollout_metrics([g for g, part in zip(groups, parts, strict=True) if part == name])
        metrics |= {f"{prefix}/{name}/{key}": own[key] for key in PART_METRICS}
    return metrics


def engine_metrics(counts: Sequence[Mapping[str, float]], *, gen_s: float) -> dict[str, float]:
    """What the engines did, from the counts of all ranks (`VllmEngine.take_counts`). `gen_s` is how
    long generation took, up to the last response of the slowest engine."""
    engines = [count for count in counts if count]
    total = {name: sum(e[name] for e in engines) for name in engines[0]}
    idle = [1 - e["generate_s"] / gen_s for e in engines]
    metrics = {
        f"perf/{kind}_tokens_per_s": total[f"{kind}_tokens"] / total[f"{kind}_s"]
        for kind in ("prefill", "decode")
        if total[f"{kind}_s"]
    }
    for name in ("prefill_s", "decode_s"):
        values = [e[name] for e in engines]
        metrics |= {
            f"perf/engine/{name}/mean": np.mean(values),
            f"perf/engine/{name}/max": max(values),
        }
    for name in ("prefill_tokens", "decode_tokens", "preemptions"):
        metrics[f"perf/engine/{name}/sum"] = total[name]
    for name, cached, tokens in (
        ("cached_share", "cached_tokens", "prompt_tokens"),
        ("sibling_cached_share", "sibling_cached_tokens", "sibling_tokens"),
    ):
        if total[tokens]:
            metrics[f"perf/engine/{name}"] = total[cached] / total[tokens]
    metrics |= {
        "perf/engine/idle_share/mean": np.mean(idle),
        "perf/engine/idle_share/max": max(idle),
        "perf/engine/slowest": idle.index(min(idle)),
        "perf/engine/sync_s/max": max(e["sync_s"] for e in engines),
        "perf/engine/sync_bytes/max": max(e["sync_bytes"] for e in engines),
    }
    return {name: float(value) for name, value in metrics.items()}


def judge_metrics(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The judge's counts of all ranks as metrics; nothing where no judge counted."""
    if not counts[0]:
        return {}
    total = {name: sum(c[name] for c in counts) for name in counts[0]}
    latency = total.pop("latency_s") / max(total.pop("replies"), 1)
    metrics = {f"reward/judge/{name}": value for name, value in total.items()}
    return metrics | {"reward/judge/latency_s": latency}


def custom_metrics(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The counts of own rewards of all ranks as metrics; nothing where there are none."""
    if not counts[0]:
        return {}
    total = {name: sum(c[name] for c in counts) for name in counts[0]}
    latency = total.pop("seconds") / max(total["asked"], 1)
    metrics = {f"reward/custom/{name}": value for name, value in total.items()}
    return metrics | {"reward/custom/latency_s": latency}


def rollout_records(groups: Sequence[ScoredGroup]) -> list[dict[str, Any]]:
    """One record of the rollout log for each response."""
    return [
        {
            "uid": group.prompt.uid,
            "data_source": group.prompt.data_source,
            "sample": rollout.sample,
            "question": group.prompt.question,
            "prompt_end": group.prompt.end,
            "ground_truth": group.prompt.ground_truth,
            "response": rollout.text,
            "reasoning": "required" if group.prompt.reasoning_open else "optional",
            "num_tokens": len(rollout.token_ids),
            "finished": rollout.finished,
            "weight_version": rollout.weight_version,
            **_rounds(rollout),
            "score": score.value,
            "rule": score.rule,
            "judge": score.judge,
            "matched": score.matched,
            "prediction": score.prediction,
        }
        for group in groups
        for rollout, score in zip(group.rollouts, group.scores, strict=True)
    ]


def _rounds(rollout: Rollout) -> dict[str, Any]:
    """For a response of several rounds, the tokens that each version of the weights sampled."""
    if rollout.versions is None:
        return {}
    versions, tokens = np.unique(rollout.versions, return_counts=True)
    return {"version_tokens": dict(zip(map(str, versions), tokens.tolist(), strict=True))}


def num_tokens(groups: Sequence[ScoredGroup]) -> int:
    """Tokens of the groups, each prompt counted once."""
    return sum(g.prompt.num_tokens + sum(len(r.token_ids) for r in g.rollouts) for g in groups)
