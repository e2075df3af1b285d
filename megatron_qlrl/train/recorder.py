"""What a run leaves behind: its log, its checkpoints, its Hugging Face folders."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_qlrl.config.run_folder import step_of
from megatron_qlrl.config.schema import ModelConfig
from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.evaluate.evaluation import Evaluation
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.metrics.monitor import Monitor
from megatron_qlrl.metrics.rollouts import rollout_records
from megatron_qlrl.metrics.sinks import Tracker
from megatron_qlrl.parallel.collectives import gather_objects, on_all_ranks
from megatron_qlrl.platform.device import memory_high_water
from megatron_qlrl.platform.progress import Progress
from megatron_qlrl.policy.policy import Policy
from megatron_qlrl.reward.diagnose import BatchWatch
from megatron_qlrl.train.run_log import RunLog
from megatron_qlrl.train.trainer import Trainer
from megatron_qlrl.types import ScoredGroup
from megatron_qlrl.weights.checkpoint import CheckpointStore, load_checkpoint, load_weights
from megatron_qlrl.weights.checkpoint_folder import read_state, taking_up
from megatron_qlrl.weights.release import copy_companions, write_release
from megatron_qlrl.weights.stream import WeightStream


class DataState(Protocol):
    """What draws a loop's data, if it has state."""

    def state_dict(self) -> dict[str, Any]: ...
    def release(self) -> None: ...


def newest_checkpoint(store: CheckpointStore, command: str) -> Path | None:
    """The checkpoint that `qlrl <command>` continues from, or None for a fresh start (collective).

    Raises:
        CheckpointError: another command left it in run.dir.
    """
    newest = store.newest()

    def check() -> None:
        if newest is None:
            return
        with taking_up(newest):
            other = read_state(newest)["command"]
        if other != command:
            raise CheckpointError(
                f"run.dir {store.folder.parent} holds a run of `qlrl {other}`, which "
                f"`qlrl {command}` cannot go on with; set run.dir to another folder, and "
                "model.path to the Hugging Face folder to start from"
            )

    on_all_ranks(check)
    return newest


class Recorder:
    """Methods are collective unless they say otherwise."""

    def __init__(
        self,
        *,
        policy: Policy,
        stream: WeightStream,
        store: CheckpointStore,
        log: RunLog,
        evaluation: Evaluation,
        monitor: Monitor,
        model: ModelConfig,
        dtype: str,
        facts: Mapping[str, Any],
        card: Callable[[Mapping[str, Any], int, Path], str],
        identity: Mapping[str, Any],
        rollouts_per_step: int,
        fresh_steps: frozenset[int],
        keep_best: bool,
        progress: Progress,
        warn: Callable[[str], None],
    ) -> None:
        """
        Args:
            model, dtype: where config and tokenizer of a release come from, and the type of its
                weights.
            facts: what checkpoints keep for the model card.
            card: makes the card of a release from the facts, the number of steps done and the
                folder.
            identity: what every checkpoint of the run holds: command, fingerprint and parent.
            rollouts_per_step: groups of a step that the rollout log shows.
            fresh_steps: of a checkpoint at these steps the weights alone are loaded: a phase begins
                there with a new optimizer state.
            keep_best: the checkpoint of the best evaluation stays beside the newest ones.
        """
        self.store = store
        self._policy, self._stream, self._log = policy, stream, log
        self._evaluation, self._monitor = evaluation, monitor
        self._model, self._folder, self._dtype = model, Path(model.path), dtype
        self._facts, self._identity = dict(facts), dict(identity)
        self._card, self._steps_done = card, 0
        self._rollouts_per_step, self._fresh_steps = rollouts_per_step, fresh_steps
        self._keep_best = keep_best
        self._progress, self._warn = progress, warn
        self._is_writer = policy.context.rank == 0
        self._batch_watch = BatchWatch(warn)
        self._unsaved: tuple[int, Mapping[str, Any]] | None = None
        self._timing = Meter()

    # --- a step -------------------------------------------------------------------------

    def record(
        self,
        step: int,
        meter: Meter,
        groups: Sequence[ScoredGroup],
        *,
        num_tokens: int,
        trainer: Trainer,
        data: DataState | None,
    ) -> None:
        """Logs a step with its monitor's counts, speed and memory, goes back to the newest good
        checkpoint if the monitor demands it, and takes the state that `save` writes.

        Args:
            groups: what the step generated; none in SFT.
            num_tokens: tokens that the step generated or trained on, prompts included.
            trainer, data: their state belongs to the checkpoint, as "trainer" and "sampler".
        """
        self._batch_watch.observe(step, groups)
        meter.update(self._monitor.end())
        seconds = meter.seconds("step")
        meter.add("perf/total_num_tokens", num_tokens)
        meter.add("perf/throughput", num_tokens / seconds / self._policy.context.world_size)
        highest = gather_objects(memory_high_water())
        meter.update({name: max(rank[name] for rank in highest) for name in highest[0]})
        meter.update(self._timing.summary())
        self._timing = Meter()
        shown = rollout_records(groups[: self._rollouts_per_step])

        def write(tracker: Tracker) -> None:
            tracker.log(step, meter.summary())
            tracker.rollouts(step, shown)

        self._log.write(write)
        if self._rolled_back() and data is not None:
            data.release()
        state = {"monitor": self._monitor.state_dict(), "trainer": trainer.state_dict()}
        if data is not None:
            state["sampler"] = data.state_dict()
        self._unsaved, self._steps_done = (step + 1, state), step + 1

    def _rolled_back(self) -> bool:
        """Takes weights and optimizer from the newest good checkpoint if the monitor demands it.
        Steps, prompts and weight versions go on: the same again would end the same."""
        if self._monitor.demand != "roll_back":
            return False
        path = self.store.newest()
        if path is None:
            self._warn(f"{self._monitor.reason}; there is no checkpoint to go back to: it goes on")
            return False
        self._load(path, step=step_of(path))
        self._monitor.rolled_back()
        self._warn(f"{self._monitor.reason}; weights and optimizer are those of {path} again")
        return True

    # --- checkpoints --------------------------------------------------------------------

    def start(self, path: Path | None) -> dict[str, Any]:
        """Opens the log, after loading the checkpoint at `path` into the policy and the parts.
        Returns the checkpoint's whole state, or {} for a fresh start (None)."""
        if path is None:
            self._log.open(None)
            return {}
        state = self._load(path, step=step_of(path))
        with taking_up(path):
            self._policy.version = state["version"]
            self._evaluation.load_state_dict(state["evaluation"])
            self._monitor.load_state_dict(state["monitor"])
            tracked = {name: state["tracker"][name] for name in ("step", "lines", "wandb_id")}
            self._steps_done = state["step"]
            self._keep_name(state)
        if self._is_writer:
            print(f"resuming from {path} at step {state['step']}", flush=True)
        self._log.open(tracked)
        return state

    def start_from(self, parent: Path, *, reference: Path) -> dict[str, Any]:
        """Opens the log of a new run, after loading weights and optimizer state from the checkpoint
        of another one. Returns that checkpoint's state.

        Args:
            reference: folder that gets the weights, for later processes of this run.
        """
        state = self._load(parent, step=0)
        with taking_up(parent):
            self._keep_name(state)
        self.release(reference)
        self._log.open(None)
        return state

    def _keep_name(self, state: Mapping[str, Any]) -> None:
        if self._model.name is None:
            # The model is the same; its folder may have another name by now.
            self._facts["base model"] = state["facts"]["base model"]

    def _load(self, path: Path, *, step: int) -> dict[str, Any]:
        """Loads a checkpoint as the state of this run after `step` steps."""
        model, optimizer = self._policy.model, self._policy.optimizer
        with self._progress.doing(f"loading {path}"), self._policy.optimizer_at_hand():
            if step not in self._fresh_steps:
                return load_checkpoint(path, model=model, optimizer=optimizer)
            state = load_weights(path, model=model)
            optimizer.reload_model_params()
            self._policy.fresh_moments()
        return state

    @property
    def _best_step(self) -> int | None:
        """The step whose checkpoint is kept because its evaluation is the best so far."""
        best = self._evaluation.ranking.best
        return best.steps_done if self._keep_best and best is not None else None

    def keeps(self, steps_done: int) -> bool:
        """Whether the checkpoint of a step is kept as the best so far."""
        return self._best_step == steps_done

    def save(self) -> None:
        """A checkpoint of the last step recorded, unless there is one already; the store writes it
        while training goes on."""
        if self._unsaved is None:
            return
        step, state = self._unsaved
        with self._timing.timed("save_checkpoint"):
            save_checkpoint(
                self.store,
                self._policy,
                step,
                companions=self._folder,
                dtype=self._dtype,
                facts=self._facts_now(),
                spare=self._best_step,
                state={
                    **self._identity,
                    **state,
                    "evaluation": self._evaluation.state_dict(),
                    "tracker": self._log.state_dict(),
                },
            )
        self._unsaved = None

    def finish(self) -> None:
        """All that is left to write is written, before any rank leaves: srun, like any launcher,
        ends the others a while after the first one has left."""
        self.store.wait()
        self._log.close()
        gather_objects(None)

    def release_best(self, folder: Path) -> None:
        """Writes the weights with the best evaluation as a Hugging Face folder, in place of the
        present ones, which are gone afterwards. Without any evaluation the present ones.

        Raises:
            CheckpointError: their checkpoint cannot be read (every rank).
        """
        step = self._best_step
        if step is None:
            self._warn("no evaluation has a score, so the release has the last weights")
        elif step != self._steps_done:
            self.store.wait()
            path = self.store.path(step)
            with self._progress.doing(f"loading the best weights, those of {path}"):
                load_weights(path, model=self._policy.model)
            self._steps_done = step
        self.release(folder)

    def _facts_now(self) -> dict[str, Any]:
        """What a card says beside the run's folder, with the best and the last evaluation."""
        ranking = self._evaluation.ranking
        scores = {"best evaluation": ranking.best, "last evaluation": ranking.last}
        return self._facts | {name: str(score) for name, score in scores.items() if score}

    def release(self, folder: Path) -> None:
        """Writes the present weights as a Hugging Face folder."""
        write_release(
            self._stream,
            folder,
            companions=self._folder,
            card=partial(self._card, self._facts_now(), self._steps_done),
            writer=self._is_writer,
            dtype=self._dtype,
            positions=self._policy.model_shape.position_fields(),
        )


def save_checkpoint(
    store: CheckpointStore,
    policy: Policy,
    step: int,
    *,
    companions: Path,
    dtype: str,
    facts: Mapping[str, Any],
    state: Mapping[str, Any],
    spare: int | None = None,
) -> None:
    """A checkpoint of the policy with `state`; `companions` is the folder whose config and
    tokenizer it gets, for an export by itself; `spare` is a step whose checkpoint stays."""
    store.save(
        step,
        model=policy.model,
        optimizer=policy.optimizer,
        state={
            **state,
            "step": step,
            "version": policy.version,
            "dtype": dtype,
            "facts": {**facts, "optimizer updates": policy.version},
        },
        companions=partial(
            copy_companions,
            companions,
            dtype=dtype,
            positions=policy.model_shape.position_fields(),
        ),
        spare=spare,
    )
