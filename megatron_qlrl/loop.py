"""The RL loop. One process per device; every rank runs the same code on the same decisions.

draw prompts ---> awake engine: reshard weights, generate groups, score, exchange
     ^                                                  |
     |                                                  v
curriculum <-- observe <-- scored groups --> spread? --no--> draw others (dynamic sampling)
                                                |yes
                                                v
                          advantages --> packed rows --> old/reference log-probs
                                                                      |
checkpoint, evaluation, logs <-- metrics <-- optimizer updates <------+
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np

from megatron_qlrl.curriculum.dynamic import Batch, DynamicSampler
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.metrics.monitor import Monitor
from megatron_qlrl.metrics.rollouts import part_metrics, rollout_metrics
from megatron_qlrl.metrics.timer import Timer
from megatron_qlrl.types import (
    PackedRow,
    ScoredGroup,
    StepReport,
    TrainGroup,
    TrainResponse,
)


@dataclass(frozen=True)
class Phase:
    """Steps [first_step, end_step) of the run."""

    index: int
    name: str
    first_step: int
    end_step: int


# Advantages [G] of a group's responses (0 for one without a verdict).
Advantages = Callable[[ScoredGroup], np.ndarray]
# Log-probs by (group, sample).
Logprobs = Mapping[tuple[int, int], np.ndarray]


@dataclass(frozen=True)
class Trainer:
    """What one optimizer batch goes through, as plain callables.

    Attributes:
        pack: groups -> this data-parallel rank's rows.
        add_logprobs: rows and a column name -> rows with that column.
        reference: context in which the policy has the reference weights; None without one.
        update: rows and the number of the update -> metrics.
        gather: log-probs of this data-parallel rank's rows -> those of all ranks.
    """

    pack: Callable[[Sequence[TrainGroup]], list[PackedRow]]
    add_logprobs: Callable[[Sequence[PackedRow], str], list[PackedRow]]
    reference: Callable[[], AbstractContextManager[None]] | None
    update: Callable[[Sequence[PackedRow], int], dict[str, float]]
    gather: Callable[[Logprobs], Logprobs]


def run_phases(
    phases: Sequence[Phase],
    *,
    first_step: int,
    prompts_per_step: int,
    updates_per_step: int,
    sampler: DynamicSampler,
    advantages: Advantages,
    trainer: Trainer,
    monitor: Monitor,
) -> Iterator[tuple[Phase, StepReport, list[ScoredGroup]]]:
    """Yields after every step; the caller logs, does what the monitor demands, saves and
    evaluates."""
    for phase in phases:
        for step in range(max(phase.first_step, first_step), phase.end_step):
            meter = Meter()
            with Timer(meter, "step"):
                with Timer(meter, "gen"):
                    batch = sampler.fill(phase.index, step, prompts_per_step)
                meter.update(step_metrics(batch, phase.index, sampler))
                monitor.begin(step, phase.index, meter.summary())
                with Timer(meter, "update_actor"):
                    sampler.hold(with_old_logprobs(batch.surplus, trainer))
                    for metrics in train_on(
                        to_train_groups(batch.groups, advantages),
                        trainer,
                        first_update=step * updates_per_step,
                        num_updates=updates_per_step,
                    ):
                        meter.update(metrics)
            meter.update(monitor.end())
            summary = meter.summary()
            tokens = sum(
                g.prompt.num_tokens + sum(len(r.token_ids) for r in g.rollouts)
                for g in batch.generated
            )
            summary["perf/total_num_tokens"] = tokens
            summary["perf/throughput"] = tokens / summary["timing_s/step"]
            yield phase, StepReport(step, summary), batch.generated


def step_metrics(batch: Batch, phase: int, sampler: DynamicSampler) -> dict[str, float]:
    """What is known before the first update: rewards and lengths, also by data source and by
    new or carried; the batch; the curriculum."""
    groups, curriculum = batch.generated, sampler.curriculum
    return (
        rollout_metrics(groups)
        | part_metrics(groups, "source", lambda g: g.prompt.data_source)
        | part_metrics(groups, "curriculum", lambda g: curriculum.source(phase, g.prompt.uid))
        | batch.metrics
        | curriculum.metrics(phase)
    )


def to_train_groups(groups: Sequence[ScoredGroup], advantages: Advantages) -> list[TrainGroup]:
    """Groups with their advantages; samples without a verdict are left out."""
    found = []
    for group in groups:
        old = group.old_logprobs or [None] * len(group.rollouts)
        parts = zip(group.rollouts, advantages(group), old, group.scores, strict=True)
        responses = tuple(
            TrainResponse(rollout.token_ids, float(advantage), rollout.engine_logprobs, logprobs)
            for rollout, advantage, logprobs, score in parts
            if score.value is not None
        )
        found.append(TrainGroup(group.prompt.token_ids, responses))
    return found


def with_old_logprobs(groups: Sequence[ScoredGroup], trainer: Trainer) -> list[ScoredGroup]:
    """Groups that are to wait, with the log-probs of the present weights, which sampled them and
    are gone when the groups are trained on. (The engine's log-probs would not do: with top_p < 1
    they are those of the nucleus.)"""
    new = [i for i, group in enumerate(groups) if group.old_logprobs is None]
    if not new:
        return list(groups)
    rows = trainer.pack(
        [
            TrainGroup(
                groups[i].prompt.token_ids,
                tuple(TrainResponse(r.token_ids, 0.0) for r in groups[i].rollouts),
            )
            for i in new
        ]
    )
    found = trainer.gather(
        {
            (group, sample): row.columns["old_logprobs"][place]
            for row in trainer.add_logprobs(rows, "old_logprobs")
            for group, sample, place in row.slices()
        }
    )
    done = list(groups)
    for number, i in enumerate(new):
        samples = range(len(groups[i].rollouts))
        done[i] = replace(groups[i], old_logprobs=tuple(found[number, k] for k in samples))
    return done


def split_updates(batch: Sequence[TrainGroup], num: int) -> list[Sequence[TrainGroup]]:
    """The batch in at most `num` mini-batches of whole groups, nearly equal, none empty."""
    bounds = [len(batch) * i // num for i in range(num + 1)]
    return [batch[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if a < b]


def train_on(
    batch: Sequence[TrainGroup], trainer: Trainer, *, first_update: int, num_updates: int
) -> Iterator[dict[str, float]]:
    """Log-probs of the whole batch first (the old policy is the one that sampled it), then one
    optimizer update per mini-batch. With one update on groups of the present weights the old
    policy is the present one, and the extra forward pass is left out."""
    shares = split_updates(batch, num_updates)
    work = [trainer.pack(share) for share in shares]
    if trainer.reference is not None:
        with trainer.reference():
            work = [trainer.add_logprobs(rows, "ref_logprobs") for rows in work]
    waited = any(r.old_logprobs is not None for g in batch for r in g.responses)
    if len(work) > 1 or waited:
        work = [trainer.add_logprobs(rows, "old_logprobs") for rows in work]
    for number, (rows, share) in enumerate(zip(work, shares, strict=True)):
        yield trainer.update(restore_old(rows, share), first_update + number)


def restore_old(rows: Sequence[PackedRow], groups: Sequence[TrainGroup]) -> list[PackedRow]:
    """Rows whose groups of earlier weights have the log-probs of those weights as old ones."""
    return [_restore_old(row, groups) for row in rows]


def _restore_old(row: PackedRow, groups: Sequence[TrainGroup]) -> PackedRow:
    places = {
        (group, sample): place
        for group, sample, place in row.slices()
        if groups[group].responses[sample].old_logprobs is not None
    }
    if not places:
        return row
    column = row.columns["old_logprobs"].copy()
    for (group, sample), place in places.items():
        column[place] = groups[group].responses[sample].old_logprobs
    return replace(row, columns={**row.columns, "old_logprobs": column})
