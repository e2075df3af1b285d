"""Warm-up SFT on the same path as RL: packed rows, Megatron schedule, loss on responses only."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.metrics.monitor import Monitor
from megatron_qlrl.metrics.timer import Timer
from megatron_qlrl.types import Example, PackedRow, StepReport, TrainGroup, TrainResponse


def num_sft_steps(num_examples: int, *, batch_size: int, epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of the run; an epoch's last, smaller batch counts."""
    steps = epochs * -(-num_examples // batch_size)
    return steps if max_steps is None else min(steps, max_steps)


def batch_indices(num_examples: int, *, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Examples of one step: a pure function of the step, so resuming needs no data state."""
    per_epoch = -(-num_examples // batch_size)
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return order[place * batch_size : (place + 1) * batch_size]


def run_sft_steps(
    examples: Sequence[Example],
    *,
    first_step: int,
    num_steps: int,
    batch_size: int,
    seed: int,
    pack: Callable[[Sequence[TrainGroup]], list[PackedRow]],
    update: Callable[[Sequence[PackedRow], int], dict[str, float]],
    monitor: Monitor,
) -> Iterator[StepReport]:
    """Yields after every step; the caller logs, does what the monitor demands and saves."""
    for step in range(first_step, num_steps):
        meter = Meter()
        monitor.begin(step, 0, {})
        with Timer(meter, "step"):
            chosen = batch_indices(len(examples), batch_size=batch_size, step=step, seed=seed)
            batch = [as_group(examples[i]) for i in chosen]
            meter.update(update(pack(batch), step))
        tokens = sum(len(g.prompt_ids) + len(g.responses[0].token_ids) for g in batch)
        meter.add("batch/examples", len(batch))
        meter.update(monitor.end())
        summary = meter.summary()
        summary["perf/total_num_tokens"] = tokens
        summary["perf/throughput"] = tokens / summary["timing_s/step"]
        yield StepReport(step, summary)


def as_group(example: Example) -> TrainGroup:
    return TrainGroup(example.prompt.token_ids, (TrainResponse(example.response_ids, 1.0),))
