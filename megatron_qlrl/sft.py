"""Warm-up SFT on the same path as RL: packed rows, Megatron schedule, loss on responses only."""

from collections.abc import Sequence

import numpy as np

from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.train.phases import Phase
from megatron_qlrl.train.run import Run
from megatron_qlrl.train.trainer import Trainer
from megatron_qlrl.types import Example, TrainGroup, TrainResponse


def train_sft(
    run: Run,
    trainer: Trainer,
    examples: Sequence[Example],
    phase: Phase,
    *,
    first_step: int,
    batch_size: int,
    seed: int,
) -> None:
    """The steps of the run, which is one phase, from `first_step` on."""
    for _, step in run.steps([phase], first_step):
        meter = Meter()
        with meter.timed("step"):
            # Draw.
            chosen = batch_indices(len(examples), batch_size=batch_size, step=step, seed=seed)
            groups = [as_group(examples[i]) for i in chosen]
            meter.add("batch/examples", len(groups))

            # Train.
            run.monitor.begin(step, phase.index, {})
            trainer.update(groups, step=step, meter=meter)

        # Record, then decide: stop, evaluate, save.
        num_tokens = sum(len(g.prompt_ids) + len(g.responses[0].token_ids) for g in groups)
        run.recorder.record(step, meter, [], num_tokens=num_tokens, trainer=trainer, data=None)
        run.decide(phase, step)


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


def as_group(example: Example) -> TrainGroup:
    return TrainGroup(example.prompt.token_ids, (TrainResponse(example.response_ids, 1.0),))
