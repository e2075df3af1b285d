"""The RL loop. One process per device; every rank runs the same code on the same decisions.

draw prompts ---> engine wakes at the first: reshard weights, generate, score, exchange
     ^                                                  |
     |                                                  v
curriculum <-- observe <-- scored groups --> spread? --no--> draw others (dynamic sampling)
                                                |yes
                                                v
                          advantages --> packed rows --> old/reference log-probs
                                                                      |
checkpoint, evaluation, logs <-- metrics <-- optimizer updates <------+
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_qlrl.curriculum.sampler import Batch, Sampler
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.metrics.rollouts import num_tokens, part_metrics, rollout_metrics
from megatron_qlrl.rollout.collect import Collector
from megatron_qlrl.rollout.vllm_engine import Sampling
from megatron_qlrl.train.phases import Phase
from megatron_qlrl.train.run import Run
from megatron_qlrl.train.trainer import Trainer
from megatron_qlrl.types import ScoredGroup, TrainGroup


@dataclass(frozen=True)
class RLParts:
    """What the loop joins.

    Attributes:
        advantages: scored groups -> the same groups with advantages, as they are trained on.
    """

    run: Run
    sampler: Sampler
    collector: Collector
    sampling: Sampling
    advantages: Callable[[Sequence[ScoredGroup]], list[TrainGroup]]
    trainer: Trainer


def train_rl(parts: RLParts, phases: Sequence[Phase], *, first_step: int) -> None:
    """The steps of `phases` from `first_step` on. What ends a run early (a stop, a lost judge, an
    unstable update) is raised through here on every rank; `build.open_run` then saves the run as
    the last step left it."""
    run, sampler, trainer = parts.run, parts.sampler, parts.trainer
    for phase, step in run.steps(phases, first_step):
        meter = Meter()
        with meter.timed("step"):
            # Draw and collect, until dynamic sampling has what it wants.
            last = step + 1 == phase.end_step
            sampler.begin(phase.index, step, version=trainer.policy.version, last=last)
            with parts.collector.session(
                parts.sampling, step=step, meter=meter, budget=sampler.budget
            ) as collect:
                while prompts := sampler.draw():
                    sampler.observe(collect(prompts))
            batch = sampler.take()
            meter.update(batch_metrics(batch, sampler, phase.index))

            # Train. What waits keeps the log-probs of these weights, before they change.
            run.monitor.begin(step, phase.index, meter.summary())
            sampler.hold(trainer.with_old_logprobs(batch.waiting, meter))
            with meter.timed("adv"):
                groups = parts.advantages(batch.groups)
            trainer.update(groups, step=step, meter=meter)

        # Record, then decide: stop, evaluate, save, next phase.
        run.recorder.record(
            step,
            meter,
            batch.generated,
            num_tokens=num_tokens(batch.generated),
            trainer=trainer,
            data=sampler,
        )
        run.decide(phase, step)


def batch_metrics(batch: Batch, sampler: Sampler, phase: int) -> dict[str, float]:
    """What is known before the first update: rewards and lengths, also by data source and by
    new or carried; the batch; the curriculum."""
    groups, curriculum = batch.generated, sampler.curriculum
    tasks = curriculum.tasks_of([g.prompt for g in groups])
    return (
        rollout_metrics(groups)
        | part_metrics(groups, "source", [g.prompt.data_source for g in groups])
        | part_metrics(
            groups, "curriculum", [curriculum.source(phase, g.prompt.uid) for g in groups]
        )
        | (part_metrics(groups, "task", tasks) if tasks else {})
        | batch.metrics
        | curriculum.metrics(phase)
    )
