"""`Run`: the parts of one run joined, with what RL, SFT and evaluation share."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_qlrl import __version__
from megatron_qlrl.advantage.filters import has_spread
from megatron_qlrl.compose.evaluation import Evaluation
from megatron_qlrl.compose.fingerprint import check_resume, fingerprint
from megatron_qlrl.compose.parts import (
    check_resumable,
    check_vocabulary,
    load_tokenizer,
    make_context,
    make_policy,
    make_store,
    rollout_records,
    run_facts,
    save_checkpoint,
    weight_dtype,
)
from megatron_qlrl.compose.rollouts import Rollouts
from megatron_qlrl.config.load import save_config
from megatron_qlrl.config.schema import Config
from megatron_qlrl.config.shape import read_shape
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.curriculum.dynamic import DynamicSampler
from megatron_qlrl.errors import ConfigError, RewardError, StabilityError, StopRequested
from megatron_qlrl.loop import Trainer
from megatron_qlrl.metrics.monitor import Monitor
from megatron_qlrl.metrics.sinks import Tracker
from megatron_qlrl.packing.distribute import group_rows, make_rows
from megatron_qlrl.packing.rows import slice_group
from megatron_qlrl.parallel.collectives import gather_dicts, gather_objects, on_all_ranks
from megatron_qlrl.parallel.context import process_group
from megatron_qlrl.plan.flops import block_flops
from megatron_qlrl.platform.env import init_ranks, set_engine_env
from megatron_qlrl.platform.lock import Lock, take_lock
from megatron_qlrl.platform.machine import commit
from megatron_qlrl.platform.progress import Progress
from megatron_qlrl.platform.watchdog import watch_steps
from megatron_qlrl.policy.optimizer import learning_rate
from megatron_qlrl.policy.policy import Loss, Policy
from megatron_qlrl.policy.selfcheck import check_sharing
from megatron_qlrl.reward.diagnose import BatchWatch
from megatron_qlrl.types import (
    PackedRow,
    ScoredGroup,
    StepReport,
    TrainGroup,
)
from megatron_qlrl.weights.checkpoint import load_checkpoint, load_weights
from megatron_qlrl.weights.checkpoint_folder import read_state, step_of, taking_up
from megatron_qlrl.weights.release import write_release
from megatron_qlrl.weights.stream import WeightStream

T = TypeVar("T")


@contextmanager
def joined(run_dir: Path) -> Iterator[ExitStack]:
    """The process group of the job, which has run.dir to itself: rank 0 holds the lock until the
    end. The stack that is yielded lets go of it; emptied (`pop_all`), it leaves the lock to the
    program that goes on in this process.

    Raises:
        ConfigError: another run holds it (every rank).
    """
    ranks = init_ranks()

    def lock() -> list[Lock]:
        if ranks.rank:
            return []
        return [take_lock(run_dir / "run.lock", what=f"run.dir {run_dir}")]

    with (
        process_group(rank=ranks.rank, local_rank=ranks.local_rank, world_size=ranks.world_size),
        ExitStack() as held,
    ):
        for taken in on_all_ranks(lock):
            held.enter_context(closing(taken))
        yield held


@contextmanager
def open_run(
    config: Config,
    command: str,
    *,
    temperature: float,
    whole: Config | None = None,
    weights: Path | None = None,
    give_up: Callable[[], str] = lambda: "",
) -> Iterator["Run"]:
    """Policy, trackers; the engine follows at its first use. Inside `joined()`.

    Args:
        config: what the parts are made from.
        command: the qlrl command that goes on with this run's checkpoints.
        whole: the config of the whole run, where `config` is that of some of its phases.
        weights: Hugging Face folder that the policy starts from, else model.path.
        give_up: asked while responses are generated: this rank's reason to stop, or "".
    """
    if command != "eval":
        check_resumable(config)
    set_engine_env(cpu_kv_cache_gib=config.rollout.cpu_kv_cache_gib)
    folder = weights or Path(config.model.path)
    run = Run(
        config,
        command,
        whole=whole or config,
        temperature=temperature,
        weights=folder,
        give_up=give_up,
    )
    try:
        yield run
        run.finish()
    except (StopRequested, RewardError, StabilityError):  # on every rank
        run.save()
        run.finish()
        raise
    finally:
        run.close()


class Run:
    """The parts of one run, joined. Methods are collective unless they say otherwise."""

    def __init__(
        self,
        config: Config,
        command: str,
        *,
        whole: Config,
        temperature: float,
        weights: Path,
        give_up: Callable[[], str],
    ) -> None:
        self.config, self.whole = config, whole
        self.folder = Path(config.run.dir)
        self.shape = read_shape(config.model.path, rope_scaling=config.model.rope_scaling)
        self.context = make_context(config)
        self._command = command
        self._temperature, self._weights = temperature, weights
        self.leads = self.context.rank == 0
        self.progress = Progress.of_rank(self.context.rank)
        self.tokenizer = load_tokenizer(Path(config.model.path))
        check_vocabulary(self.tokenizer, self.shape.vocab_size)
        self.tracker = Tracker.silent()
        self.store = make_store(config)
        self.monitor = Monitor(config.stability, warn=self.warn)
        self._batch_watch = BatchWatch(self.warn)
        self._sharing_checked = False
        self.rollouts = Rollouts(
            config,
            shape=self.shape,
            context=self.context,
            tokenizer=self.tokenizer,
            weights=self._present_weights,
            give_up=give_up,
            progress=self.progress,
        )
        self.evaluation = Evaluation(
            config, rollouts=self.rollouts, write=self._record, warn=self.warn
        )
        self._unsaved: tuple[int, Mapping[str, Any]] | None = None
        self._fresh_steps: frozenset[int] = frozenset()
        self._fingerprint: Mapping[str, Any] = {}
        self._first_facts: dict[str, Any] = {}

    def record_start(self) -> None:
        """The resolved config, and a line for every start: which code, on how many ranks. Once it
        is known that the run goes on: what is refused leaves nothing behind."""
        self._on_disk(self._write_start)

    def _write_start(self) -> None:
        save_config(self.whole, self.folder / "config.yaml")
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "commit": commit(),
            "world_size": self.context.world_size,
        }
        with (self.folder / "starts.jsonl").open("a") as stream:
            stream.write(json.dumps(start) + "\n")

    def finish(self) -> None:
        """All that is left to write is written, before any rank leaves: srun, like any launcher,
        ends the others a while after the first one has left."""
        self.store.wait()
        self.tracker.close()
        gather_objects(None)

    def close(self) -> None:
        self.store.close()
        self.tracker.close()
        self.rollouts.close()

    # Made at first use, so that bad data is found before minutes of loading weights.

    @cached_property
    def policy(self) -> Policy:
        with self.progress.doing(f"loading the weights of {self._weights}"):
            return make_policy(
                self.config,
                self.shape,
                self.context,
                temperature=self._temperature,
                weights=self._weights,
            )

    @cached_property
    def stream(self) -> WeightStream:
        return WeightStream(
            self.policy.model,
            shape=self.shape,
            context=self.context,
            bucket_bytes=self.config.rollout.sync_bucket_mib * 2**20,
        )

    def _present_weights(self) -> tuple[WeightStream, int]:
        """For the engine, with as much memory beside them as there can be."""
        self.policy.free_gradients()
        return self.stream, self.policy.version

    def read_benchmarks(self) -> None:
        with self.progress.doing("reading the evaluation files"):
            self.evaluation.read(self.tokenizer, max_positions=self.shape.max_positions)

    # --- curriculum ---------------------------------------------------------------------

    def sampler(self, curriculum: Curriculum) -> DynamicSampler:
        config = self.config
        return DynamicSampler(
            curriculum,
            config=config.algorithm,
            carried_share=config.curriculum.carried_share,
            keep=has_spread if config.algorithm.filter_groups else lambda rewards: True,
            collect=self.rollouts.collect,
            version=lambda: self.policy.version,
            warn=self.warn,
        )

    def warn(self, message: str) -> None:
        """One line on the console, from rank 0 (not collective)."""
        if self.leads:
            print(f"qlrl: warning: {message}", flush=True)

    # --- training -----------------------------------------------------------------------

    def trainer(self, loss: Loss, *, total_updates: int, aggregation: Any = None) -> Trainer:
        config, policy = self.config, self.policy
        updates = config.algorithm.updates_per_step

        def pack(groups: Sequence[TrainGroup]) -> list[PackedRow]:
            self._check_sharing(groups)
            return make_rows(
                groups,
                num_ranks=self.context.dp.size,
                max_tokens=config.policy.max_tokens_per_row,
                share_prompts=config.policy.share_prompts,
                aggregation=aggregation or config.algorithm.aggregation,
                constant_tokens=config.rollout.max_response_tokens,
                cost=partial(block_flops, self.shape),
            )[self.context.dp.rank]

        def update(rows: Sequence[PackedRow], number: int) -> dict[str, float]:
            total = total_updates if aggregation else total_updates * updates
            rate = learning_rate(config.optimizer, step=number, total_steps=total)
            return policy.update(rows, loss, lr=rate, permit=self.monitor.permit)

        keeps = config.algorithm.reference and aggregation is None
        reference = policy.as_reference if keeps else None
        return Trainer(pack, policy.add_logprobs, reference, update, gather_dicts)

    def watched(self, steps: Iterator[T]) -> Iterator[T]:
        """`steps`; one that hangs ends this process (not collective)."""
        file = self.folder / "stacks" / f"rank_{self.context.rank}.txt"
        told = self.progress.until_first(steps, "working on the first step")
        return watch_steps(told, stacks=file, floor_s=self.config.run.hang_after_s)

    def _check_sharing(self, groups: Sequence[TrainGroup]) -> None:
        """Once, before the first batch with a shared prompt is trained on."""
        if self._sharing_checked or not self.config.policy.share_prompts:
            return
        slices = (
            slice_group(g, prompt_tokens=256, responses=3, response_tokens=128) for g in groups
        )
        first = next((s for s in slices if len(s.responses) > 1), None)
        if first is None:
            return
        shared, separate = (
            group_rows(
                first,
                max_tokens=self.config.policy.max_tokens_per_row,
                share_prompt=share,
                cost=partial(block_flops, self.shape),
            )
            for share in (True, False)
        )
        check_sharing(self.policy, shared, separate)
        self._sharing_checked = True

    # --- record -------------------------------------------------------------------------

    def identify(self, path: Path | None, *, rows: str) -> None:
        """Takes the run's fingerprint, for its checkpoints; `rows` is the training data's.

        Raises:
            CheckpointError: the run cannot go on from the checkpoint at `path`, which is another
                run's (every rank).
        """

        def compared() -> str:
            if not self.leads:
                return ""
            self._fingerprint = fingerprint(
                self.whole, self._command, tokenizer=self.tokenizer, rows=rows
            )
            if path is None:
                return ""
            with taking_up(path):
                return check_resume(path, read_state(path), self._fingerprint)

        if line := on_all_ranks(compared):
            print(f"qlrl: {line}", flush=True)
        self.record_start()

    def restore(
        self, path: Path | None, *, fresh_steps: frozenset[int] = frozenset()
    ) -> dict[str, Any]:
        """A checkpoint into the policy; its state ({} for a fresh start, without a checkpoint).
        Of one at `fresh_steps` the weights alone are taken, now and when the run goes back to it:
        Adam starts anew there.
        """
        self._fresh_steps = fresh_steps
        state: dict[str, Any] = {}
        tracked = None
        if path is not None:
            with self.progress.doing(f"loading {path}"):
                state = self._load(path)
            with taking_up(path):
                self.policy.version = state["version"]
                self.evaluation.load_state_dict(state["evaluation"])
                self.monitor.load_state_dict(state["monitor"])
                tracked = {name: state["tracker"][name] for name in ("step", "lines", "wandb_id")}
                if self.config.model.name is None:
                    # The model is the same; its folder may have another name by now.
                    self._first_facts = {"base model": state["facts"]["base model"]}
            if self.leads:
                print(f"resuming from {path} at step {state['step']}", flush=True)
        opened = self._on_disk(partial(self._open_tracker, tracked))
        self.tracker = opened or self.tracker
        return state

    def _load(self, path: Path) -> dict[str, Any]:
        model, optimizer = self.policy.model, self.policy.optimizer
        with self.policy.optimizer_at_hand():
            if step_of(path) not in self._fresh_steps:
                return load_checkpoint(path, model=model, optimizer=optimizer)
            state = load_weights(path, model=model)
            optimizer.reload_model_params()
        return state

    def _open_tracker(self, state: Mapping[str, Any] | None) -> Tracker:
        return Tracker(
            self.folder,
            config=self.config.logging,
            run_name=self.config.run.name,
            resolved=self.whole.model_dump(mode="json"),
            state=state,
        )

    def log(self, report: StepReport, groups: Sequence[ScoredGroup]) -> None:
        self._batch_watch.observe(report.step, groups)
        shown = groups[: self.config.logging.rollouts_per_step]
        metrics = {**report.metrics, **self.rollouts.judge_metrics()}

        def write(tracker: Tracker) -> None:
            tracker.log(report.step, metrics)
            tracker.rollouts(report.step, rollout_records(shown))

        self._record(write)

    def _record(self, write: Callable[[Tracker], None]) -> None:
        self._on_disk(lambda: write(self.tracker))

    def _on_disk(self, write: Callable[[], T]) -> T | None:
        """Runs `write` on rank 0; a disk that refuses stops every rank with the reason."""

        def guarded() -> T | None:
            if not self.leads:
                return None
            try:
                return write()
            except OSError as error:
                raise ConfigError(
                    f"run.dir {self.folder} cannot be written ({error}); free space or set run.dir "
                    "elsewhere, then start again: the run resumes"
                ) from error

        return on_all_ranks(guarded)

    def went_back(self) -> bool:
        """Takes weights and optimizer from the newest good checkpoint if the monitor demands it.
        Steps, prompts and weight versions go on: the same again would end the same."""
        if self.monitor.demand != "roll_back":
            return False
        path = self.store.newest()
        if path is None:
            self.warn(f"{self.monitor.reason}; there is no checkpoint to go back to: it goes on")
            return False
        self._load(path)
        self.monitor.rolled_back()
        self.warn(f"{self.monitor.reason}; weights and optimizer are those of {path} again")
        return True

    def stop_if_unstable(self) -> None:
        """Raises StabilityError if the monitor demands it; the run is then saved as reached."""
        if self.monitor.demand == "stop":
            raise StabilityError(
                f"{self.monitor.reason}. The run is saved as it was before that update; change "
                "the settings (optimizer.lr, or the rule under stability) and start again: it "
                "resumes"
            )

    def stop_if_asked(self, reason: str) -> None:
        """Raises StopRequested on every rank if any of them has a reason (the run is then saved as
        reached), or CheckpointError if a save has failed since."""
        told = gather_objects((reason, self.store.failed()))
        if any(failed for _, failed in told):
            self.store.wait()
        reasons = [reason for reason, _ in told if reason]
        if reasons:
            raise StopRequested(reasons[0])

    def reached(self, step: int, state: Mapping[str, Any]) -> None:
        """`step` steps are done: what the next `save` writes."""
        self._unsaved = (step, {**state, "monitor": self.monitor.state_dict()})

    def save(self) -> None:
        """A checkpoint of the last step reached, unless there is one already; `finish` waits until
        it is on disk."""
        if self._unsaved is None:
            return
        step, state = self._unsaved
        more = {
            **state,
            "command": self._command,
            "fingerprint": self._fingerprint,
            "facts": self._first_facts,
            "evaluation": self.evaluation.state_dict(),
            "tracker": self.tracker.state_dict(),
        }
        save_checkpoint(
            self.store, self.policy, step, Path(self.config.model.path), self.config, more
        )
        self._unsaved = None

    def release(self, folder: Path) -> None:
        """The present weights as a Hugging Face folder."""
        write_release(
            self.stream,
            folder,
            companions=Path(self.config.model.path),
            facts=run_facts(self.config)
            | self._first_facts
            | {k: f"{v:.4f}" for k, v in self.evaluation.scores.items()},
            writer=self.leads,
            dtype=weight_dtype(self.config),
            positions=self.shape.position_fields(),
        )
