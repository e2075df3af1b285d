"""The RL loop. One process per device; every rank runs the same code on the same decisions.

draw prompts ---> awake engine: reshard weights, generate groups, score, exchange
     ^                                                  |
     |                                                  v
curriculum <-- observe <-- scored groups --> advantages, filter --> packed rows
                                                                      |
checkpoint, evaluation, logs <-- metrics <-- optimizer updates <-- old/reference log-probs
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.metrics.timer import Timer
from megatron_qlrl.types import (
    PackedRow,
    Prompt,
    Rollout,
    ScoredGroup,
    StepReport,
    TrainGroup,
    TrainResponse,
)


@dataclass(frozen=True)
class Phase:
    """One phase as the loop runs it: `draw` and `observe` belong to its sampler."""

    index: int
    name: str
    first_step: int
    end_step: int
    draw: Callable[[int], list[Prompt]]
    observe: Callable[[Sequence[ScoredGroup]], None]
    metrics: Callable[[], Mapping[str, float]]


# Scored groups of the given prompts at a step, with present weights, the same on every rank.
Collect = Callable[[Sequence[Prompt], int], list[ScoredGroup]]
# Advantages of one group's rewards (NaN = no verdict, gets 0).
Advantages = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Trainer:
    """What one optimizer batch goes through, as plain callables.

    Attributes:
        pack: groups -> this data-parallel rank's rows.
        add_logprobs: rows and a column name -> rows with that column.
        reference: context in which the policy has the reference weights; None without one.
        update: rows and the number of the update -> metrics.
    """

    pack: Callable[[Sequence[TrainGroup]], list[PackedRow]]
    add_logprobs: Callable[[Sequence[PackedRow], str], list[PackedRow]]
    reference: Callable[[], AbstractContextManager[None]] | None
    update: Callable[[Sequence[PackedRow], int], dict[str, float]]


def run_phases(
    phases: Sequence[Phase],
    *,
    first_step: int,
    prompts_per_step: int,
    updates_per_step: int,
    collect: Collect,
    advantages: Advantages,
    keep: Callable[[np.ndarray], bool],
    trainer: Trainer,
) -> Iterator[tuple[Phase, StepReport, list[ScoredGroup]]]:
    """Yields after every optimizer step; the caller logs, saves and evaluates."""
    for phase in phases:
        for step in range(max(phase.first_step, first_step), phase.end_step):
            meter = Meter()
            with Timer(meter, "step"):
                with Timer(meter, "gen"):
                    groups = collect(phase.draw(prompts_per_step), step)
                phase.observe(groups)
                batch = to_train_groups(groups, advantages, keep)
                with Timer(meter, "update_actor"):
                    for metrics in train_on(
                        batch,
                        trainer,
                        first_update=step * updates_per_step,
                        num_updates=updates_per_step,
                    ):
                        meter.update(metrics)
            meter.update(rollout_metrics(groups))
            meter.update(dict(phase.metrics()))
            meter.add("batch/kept_groups", len(batch))
            summary = meter.summary()
            tokens = sum(
                g.prompt.num_tokens + sum(len(r.token_ids) for r in g.rollouts) for g in groups
            )
            summary["perf/throughput"] = tokens / summary["timing_s/step"]
            yield phase, StepReport(step, summary), groups


def to_train_groups(
    groups: Sequence[ScoredGroup], advantages: Advantages, keep: Callable[[np.ndarray], bool]
) -> list[TrainGroup]:
    """Kept groups with their advantages; samples without a verdict are left out."""
    found = []
    for group in groups:
        rewards = group.rewards
        if not keep(rewards):
            continue
        values = advantages(rewards)
        responses = tuple(
            TrainResponse(r.token_ids, float(a), r.engine_logprobs)
            for r, a, reward in zip(group.rollouts, values, rewards, strict=True)
            if not np.isnan(reward)
        )
        found.append(TrainGroup(group.prompt.token_ids, responses))
    return found


def split_updates(batch: Sequence[TrainGroup], num: int) -> list[Sequence[TrainGroup]]:
    """The batch in at most `num` mini-batches of whole groups, nearly equal, none empty."""
    bounds = [len(batch) * i // num for i in range(num + 1)]
    return [batch[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if a < b]


def train_on(
    batch: Sequence[TrainGroup], trainer: Trainer, *, first_update: int, num_updates: int
) -> Iterator[dict[str, float]]:
    """Log-probs of the whole batch first (the old policy is the one that sampled it), then one
    optimizer update per mini-batch. With one update the old policy is the present one, and
    the extra forward pass is left out."""
    work = [trainer.pack(share) for share in split_updates(batch, num_updates)]
    if trainer.reference is not None:
        with trainer.reference():
            work = [trainer.add_logprobs(rows, "ref_logprobs") for rows in work]
    if len(work) > 1:
        work = [trainer.add_logprobs(rows, "old_logprobs") for rows in work]
    for number, rows in enumerate(work):
        yield trainer.update(rows, first_update + number)


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Rewards and lengths of a rollout batch under verl's names."""
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
