"""A run between its steps: where it begins, and what is decided after each step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from megatron_qlrl.errors import StabilityError, StopRequested
from megatron_qlrl.evaluate.evaluation import Evaluation
from megatron_qlrl.metrics.monitor import Monitor
from megatron_qlrl.parallel.collectives import gather_objects
from megatron_qlrl.platform.progress import Progress
from megatron_qlrl.platform.stop import StopSignals
from megatron_qlrl.platform.watchdog import watch_steps
from megatron_qlrl.train.phases import Phase
from megatron_qlrl.train.recorder import Recorder


@dataclass(frozen=True)
class Run:
    """The parts that RL and SFT share. Methods are collective.

    Attributes:
        total_steps: of the whole run.
        save_every: steps from one checkpoint to the next; one more is saved at a phase's end.
        hang_after_s, stacks: as in `watch_steps`.
    """

    recorder: Recorder
    evaluation: Evaluation
    monitor: Monitor
    stop: StopSignals
    progress: Progress
    total_steps: int
    save_every: int
    hang_after_s: float
    stacks: Path

    def steps(self, phases: Sequence[Phase], first_step: int) -> Iterator[tuple[Phase, int]]:
        """The steps from `first_step` on, each with its phase, until evaluations stop to improve. A
        step that hangs ends this process."""
        every = (
            (phase, step)
            for phase in phases
            for step in range(max(phase.first_step, first_step), phase.end_step)
        )
        steps = takewhile(lambda _: not self.exhausted, every)
        told = self.progress.during_first(steps, "working on the first step")
        return watch_steps(told, stacks=self.stacks, floor_s=self.hang_after_s)

    @property
    def exhausted(self) -> bool:
        """Whether the run ends early, since its evaluations have not improved for long."""
        return self.evaluation.ranking.exhausted

    def begin(self, phases: Sequence[Phase], steps_done: int) -> None:
        """Before the first step: evaluates the model that the run starts from or, after a resume,
        makes up for the evaluation in which the run may have ended. `phases` are those of the
        whole run.

        Raises:
            StopRequested: somebody asked for it already (every rank).
            RewardError: the evaluation cannot be scored (every rank).
        """
        if not steps_done:
            self.evaluation.before_training()
        for phase in phases:
            if phase.first_step < steps_done <= phase.end_step:
                self.evaluation.after(steps_done, phase.name, last=steps_done == phase.end_step)
        self.stop_if_asked(steps_done)

    def decide(self, phase: Phase, step: int) -> None:
        """After a step was recorded, in an order on which resuming depends: the next phase's
        reference, the monitor's stop, evaluation, checkpoint, the stop that somebody asked for.

        Raises:
            StabilityError, StopRequested, RewardError: the run ends (every rank), and
                `build.open_run` saves it. An evaluation may raise the last two.
            CheckpointError, ConfigError: a checkpoint, a model folder or the log cannot be written
                (every rank); nothing more is saved.
        """
        steps_done = step + 1
        is_last = steps_done == phase.end_step
        self.stop.step_done()
        if is_last and phase.next_reference is not None:
            # Before anything that may end the run with a checkpoint: the next phase needs it.
            self.recorder.release(phase.next_reference)
        if self.monitor.demand == "stop":
            raise StabilityError(
                f"{self.monitor.reason}. The run is saved as it was before that update; change "
                "the settings (optimizer.lr, or the rule under stability) and start again: it "
                "resumes"
            )
        self.evaluation.after(steps_done, phase.name, last=is_last)
        regular = is_last or steps_done % self.save_every == 0
        if regular or self.exhausted or self.recorder.keeps(steps_done):
            self.recorder.save()
        self.stop_if_asked(steps_done)

    def stop_if_asked(self, steps_done: int) -> None:
        """
        Raises:
            StopRequested: some rank has a reason to stop (every rank).
            CheckpointError: a save has failed since the last call (every rank).
        """
        reason = self.stop.between_steps(self.total_steps - steps_done)
        told = gather_objects((reason, self.recorder.store.failed()))
        if any(failed for _, failed in told):
            self.recorder.store.wait()
        reasons = [reason for reason, _ in told if reason]
        if reasons:
            raise StopRequested(reasons[0])
