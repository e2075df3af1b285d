"""The composition root: makes the parts of a run from the whole config, as frozen bundles.

Job         model shape, process groups, tokenizer: what every command needs before weights
Model       policy and engine
Run         what RL and SFT share
RLParts     what the RL loop needs beside it
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_qlrl.advantage.apply import with_advantages
from megatron_qlrl.advantage.filters import has_spread
from megatron_qlrl.config.schema import Config
from megatron_qlrl.config.shape import ModelShape, hf_shapes, read_shape
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.curriculum.phase_pool import task_of
from megatron_qlrl.curriculum.sampler import Sampler
from megatron_qlrl.data.template import response_decoder
from megatron_qlrl.data.tokenizer import check_vocabulary, load_tokenizer, stop_tokens
from megatron_qlrl.errors import ConfigError, RewardError, StabilityError, StopRequested
from megatron_qlrl.evaluate.benchmarks import read_benchmarks
from megatron_qlrl.evaluate.evaluation import Evaluation
from megatron_qlrl.evaluate.journal import AnswerJournal, open_answers
from megatron_qlrl.metrics.monitor import Monitor
from megatron_qlrl.packing.shard import shard_row
from megatron_qlrl.parallel.collectives import gather_objects, on_all_ranks
from megatron_qlrl.parallel.context import ParallelContext, init_parallel
from megatron_qlrl.platform.device import use_deterministic_kernels, weight_dtype
from megatron_qlrl.platform.env import set_engine_env
from megatron_qlrl.platform.progress import Progress
from megatron_qlrl.platform.stop import StopSignals
from megatron_qlrl.policy.entropy_control import EntropyControl
from megatron_qlrl.policy.loss import PolicyLoss, sft_loss
from megatron_qlrl.policy.policy import Policy
from megatron_qlrl.release.card import model_card
from megatron_qlrl.release.record import read_record, training_facts
from megatron_qlrl.reward.score import Scorer
from megatron_qlrl.rl import RLParts
from megatron_qlrl.rollout.collect import Collector
from megatron_qlrl.rollout.vllm_engine import Sampling, VllmEngine
from megatron_qlrl.train.fingerprint import check_resume, fingerprint
from megatron_qlrl.train.parent import Parent, check_fit
from megatron_qlrl.train.probe import WeightProbe
from megatron_qlrl.train.recorder import Recorder
from megatron_qlrl.train.run import Run
from megatron_qlrl.train.run_log import RunLog
from megatron_qlrl.train.trainer import Trainer
from megatron_qlrl.types import Prompt
from megatron_qlrl.weights.checkpoint import CheckpointStore, load_weights
from megatron_qlrl.weights.checkpoint_folder import is_checkpoint, read_state, taking_up
from megatron_qlrl.weights.stream import WeightStream, load_hf


@dataclass(frozen=True)
class Job:
    """One command in this process.

    Attributes:
        config: the config of the phases that run in this process.
        whole: the config of the whole run.
    """

    config: Config
    whole: Config
    shape: ModelShape
    context: ParallelContext
    tokenizer: Any
    progress: Progress

    @property
    def leads(self) -> bool:
        return self.context.rank == 0

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    def warn(self, message: str) -> None:
        """One line on the console, from rank 0 (not collective)."""
        if self.leads:
            print(f"qlrl: warning: {message}", flush=True)


def make_job(config: Config, whole: Config | None = None) -> Job:
    """Inside a process group; collective.

    Raises:
        ConfigError: the model's folder or tokenizer cannot be used.
    """
    set_engine_env(cpu_kv_cache_gib=config.rollout.cpu_kv_cache_gib)
    if config.policy.deterministic:
        use_deterministic_kernels()
    shape = read_shape(config.model.path, rope_scaling=config.model.rope_scaling)
    context = make_context(config)
    progress = Progress.of_rank(context.rank)
    tokenizer = load_tokenizer(Path(config.model.path))
    check_vocabulary(tokenizer, shape.vocab_size)
    return Job(config, whole or config, shape, context, tokenizer, progress)


def make_context(config: Config) -> ParallelContext:
    layout = config.policy
    return init_parallel(
        tp=layout.tp, pp=layout.pp, cp=layout.cp, ep=layout.ep, seed=config.run.seed
    )


def make_store(config: Config) -> CheckpointStore:
    """The run's checkpoints; needs the process group."""
    return CheckpointStore(
        Path(config.run.dir) / "checkpoints",
        keep=config.checkpoint.keep,
        warn=print if dist.get_rank() == 0 else lambda _: None,
    )


def make_policy(
    config: Config,
    shape: ModelShape,
    context: ParallelContext,
    *,
    temperature: float,
    weights: Path,
) -> Policy:
    """A policy with the weights of a Hugging Face folder, or those of a checkpoint."""
    layout = config.policy

    def load(model: torch.nn.Module) -> None:
        if is_checkpoint(weights):
            load_weights(weights, model=model)
        else:
            load_hf(weights, model, shape=shape, context=context)

    return Policy(
        shape,
        config=layout,
        optimizer_config=config.optimizer,
        dtype=getattr(torch, weight_dtype(config.model.dtype)),
        temperature=temperature,
        context=context,
        shard=partial(
            shard_row,
            cp_size=context.cp.size,
            cp_rank=context.cp.rank,
            multiple_of=layout.tokens_multiple,
        ),
        load=load,
    )


@dataclass(frozen=True)
class Model:
    """Policy and engine, joined by the stream of weights."""

    policy: Policy
    stream: WeightStream
    collector: Collector


def make_scorer(job: Job) -> Scorer:
    """Makes the scorer of a run, before the run writes anything; collective.

    Raises:
        ConfigError: the judge's key is not in the environment, an own reward cannot be used, or its
            file differs between ranks (every rank).
    """
    scorer = on_all_ranks(lambda: Scorer.of(job.config.reward))
    sources = gather_objects(scorer.sources)
    for name, source in sources[0].items():
        if len({own[name].digest for own in sources}) > 1:
            raise ConfigError(
                f"reward.custom: {name} is not the same on all ranks: {source.file} differs "
                "between machines; put it on a file system that all of them see"
            )
        if job.leads:
            print(f"qlrl: own reward {name}: {source.file}, SHA-256 {source.digest}", flush=True)
    return scorer


@contextmanager
def open_model(
    job: Job,
    scorer: Scorer,
    *,
    temperature: float,
    weights: Path | None = None,
    give_up: Callable[[], str] = lambda: "",
) -> Iterator[Model]:
    """Loads the policy; the engine starts at its first use.

    Args:
        scorer: closed at the end.
        temperature: at which the policy's log-probs are taken.
        weights: what the policy starts from, a Hugging Face folder or a checkpoint; by default
            model.path.
        give_up: asked while responses are generated; returns this rank's reason to stop, or "".
    """
    config, folder = job.config, weights or Path(job.config.model.path)
    rollout = config.rollout
    with closing(scorer):
        with job.progress.doing(f"loading the weights of {folder}"):
            policy = make_policy(
                config, job.shape, job.context, temperature=temperature, weights=folder
            )
        stream = WeightStream(
            policy.model,
            shape=job.shape,
            context=job.context,
            bucket_bytes=rollout.sync_bucket_mib * 2**20,
        )
        engines: list[VllmEngine] = []

        def engine() -> VllmEngine:
            if not engines:
                policy.free_gradients()  # it sizes its cache by what is free
                with job.progress.doing("starting the vLLM engine"):
                    engines.append(_make_engine(job, give_up))
            return engines[0]

        def present_weights() -> tuple[Iterator[tuple[str, torch.Tensor]], int]:
            policy.free_gradients()  # the engine gets as much memory as there can be
            return stream.for_engine(rollout.tp), policy.version

        collector = Collector(
            engine=engine,
            weights=present_weights,
            decode=response_decoder(job.tokenizer),
            scorer=scorer,
            run_seed=config.run.seed,
            max_masked_share=config.reward.max_masked_share,
            probe=WeightProbe(policy, max_tokens=_longest(job)) if rollout.check_sync else None,
            warn=job.warn,
        )
        try:
            yield Model(policy, stream, collector)
        finally:
            for started in engines:
                started.close()


def _longest(job: Job) -> int:
    """Returns the tokens of the longest sequence that the engine generates."""
    return min(job.config.longest_generation, job.shape.max_positions)


def _make_engine(job: Job, give_up: Callable[[], str]) -> VllmEngine:
    config, folder = job.config, Path(job.config.model.path)
    return VllmEngine(
        folder,
        tp=config.rollout.tp,
        rank=job.context.rank,
        world_size=job.context.world_size,
        dtype=weight_dtype(config.model.dtype),
        max_model_len=_longest(job),
        stop_token_ids=stop_tokens(folder, job.tokenizer),
        manifest=hf_shapes(job.shape.untied),
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        enforce_eager=config.rollout.enforce_eager,
        positions=job.shape.position_fields(),
        seed=config.run.seed,
        give_up=give_up,
    )


def read_held_out(job: Job) -> dict[str, list[Prompt]]:
    """The evaluation files, read and checked before weights are loaded, for that takes minutes."""
    read = partial(
        read_benchmarks,
        job.config,
        job.tokenizer,
        max_positions=job.shape.max_positions,
        warn=job.warn,
    )
    with job.progress.doing("reading the evaluation files"):
        return on_all_ranks(read)


def open_journal(job: Job) -> AnswerJournal:
    """Opens the journal of `qlrl eval`; collective.

    Raises:
        DataError: it cannot be read or written (every rank).
    """
    config = job.config
    return open_answers(
        job.folder / "eval" / "eval.journal",
        rank=job.context.rank,
        run_seed=config.run.seed,
        settings={
            "contents": on_all_ranks(
                partial(fingerprint, config, "eval", tokenizer=job.tokenizer, rows="")
            )["contents"],
            "stop_tokens": stop_tokens(Path(config.model.path), job.tokenizer),
            "dtype": weight_dtype(config.model.dtype),
            "positions": dict(job.shape.position_fields()),
            **config.evaluation.model_dump(include={"temperature", "top_p"}),
            "max_tokens": config.rollout.max_response_tokens,
        },
    )


def make_evaluation(
    job: Job,
    collector: Collector,
    benchmarks: Mapping[str, Sequence[Prompt]],
    log: RunLog,
    journal: AnswerJournal | None = None,
) -> Evaluation:
    return Evaluation(
        job.config.evaluation,
        benchmarks,
        collector=collector,
        max_response_tokens=job.config.rollout.max_response_tokens,
        folder=job.folder / "eval",
        write=log.write,
        warn=job.warn,
        progress=job.progress,
        journal=journal,
    )


@contextmanager
def open_run(
    job: Job,
    command: str,
    *,
    newest: Path | None,
    rows: str,
    stop: StopSignals,
    total_steps: int,
    temperature: float,
    weights: Path | None = None,
    fresh_steps: frozenset[int] = frozenset(),
    parent: Parent | None = None,
) -> Iterator[tuple[Model, Run]]:
    """The parts that RL and SFT share. A run that is asked to stop, or that stops itself, is saved
    as the last step left it.

    Args:
        command: the qlrl command that goes on with this run's checkpoints.
        newest: the checkpoint that the run goes on from; `Recorder.start` loads it.
        rows: digest of the training data.
        total_steps: of the whole run.
        temperature, weights: as in `open_model`.
        fresh_steps: steps at which a phase begins with a new optimizer state.
        parent: the checkpoint of another run that this one began from; without `newest`,
            `Recorder.start_from` loads it.

    Raises:
        CheckpointError: the run cannot go on from `newest`, which is another run's, or not start
            from `parent` (every rank).
    """
    config = job.config
    scorer = make_scorer(job)
    print_of_run = on_all_ranks(partial(_fingerprint, job, command, newest, parent, rows, scorer))
    benchmarks = read_held_out(job)
    log = RunLog(job.whole, is_writer=job.leads)
    log.record_start(world_size=job.context.world_size)
    monitor = Monitor(config.stability, warn=job.warn)
    with (
        open_model(
            job, scorer, temperature=temperature, weights=weights, give_up=stop.within_step
        ) as model,
        closing(make_store(config)) as store,
        closing(log),
    ):
        with model.policy.optimizer_at_hand():
            model.policy.fresh_moments()
        evaluation = make_evaluation(job, model.collector, benchmarks, log)
        recorder = Recorder(
            policy=model.policy,
            stream=model.stream,
            store=store,
            log=log,
            evaluation=evaluation,
            monitor=monitor,
            model=config.model,
            dtype=weight_dtype(config.model.dtype),
            facts=training_facts(config) | ({"parent": parent.fact()} if parent else {}),
            card=partial(_model_card, job, command),
            identity={
                "command": command,
                "fingerprint": print_of_run,
                **({"parent": parent.state()} if parent else {}),
            },
            rollouts_per_step=config.logging.rollouts_per_step,
            fresh_steps=fresh_steps,
            keep_best=config.checkpoint.keep_best,
            progress=job.progress,
            warn=job.warn,
        )
        run = Run(
            recorder=recorder,
            evaluation=evaluation,
            monitor=monitor,
            stop=stop,
            progress=job.progress,
            total_steps=total_steps,
            save_every=config.checkpoint.every_steps,
            hang_after_s=config.run.hang_after_s,
            stacks=job.folder / "stacks" / f"rank_{job.context.rank}.txt",
        )
        try:
            yield model, run
        except (StopRequested, RewardError, StabilityError):  # raised on every rank
            recorder.save()
            recorder.finish()
            raise
        recorder.finish()


def _model_card(
    job: Job, command: str, facts: Mapping[str, Any], steps_done: int, out: Path
) -> str:
    record = read_record(facts, command=command, steps_done=steps_done, folder=job.folder)
    return model_card(record, out)


def _fingerprint(
    job: Job,
    command: str,
    newest: Path | None,
    parent: Parent | None,
    rows: str,
    scorer: Scorer,
) -> dict[str, Any]:
    """The run's fingerprint, compared with that of the checkpoint it goes on or starts from; {} on
    ranks other than 0, which write no state."""
    if not job.leads:
        return {}
    today = fingerprint(
        job.whole,
        command,
        tokenizer=job.tokenizer,
        rows=rows,
        own_rewards={name: source.digest for name, source in scorer.sources.items()},
    )
    line = ""
    if newest is not None:
        with taking_up(newest):
            line = check_resume(newest, read_state(newest), today)
    elif parent is not None:
        line = check_fit(parent.checkpoint, read_state(parent.checkpoint), today)
    if line:
        print(f"qlrl: {line}", flush=True)
    return today


def make_sampler(job: Job, prompts: Sequence[Prompt]) -> Sampler:
    """
    Raises:
        DataError: a phase has no prompt.
    """
    config, whole = job.config, job.whole
    curriculum = Curriculum(
        prompts,
        limits=[phase.max_input_tokens for phase in whole.phases],
        seed=whole.run.seed,
        config=config.curriculum,
        solved_above=config.reward.solved_above,
    )
    for line in curriculum.absent_tasks():
        job.warn(line)
    return Sampler(
        curriculum,
        config=config.algorithm,
        prompts_per_step=config.rollout.prompts_per_step,
        carried_share=config.curriculum.carried_share,
        keep=has_spread if config.algorithm.filter_groups else lambda rewards: True,
        warn=job.warn,
        tokens_per_round=config.rollout.tokens_per_round,
    )


def make_rl_parts(job: Job, model: Model, run: Run, sampler: Sampler) -> RLParts:
    """The policy has the weights of its reference still, if it has one."""
    algorithm, rollout = job.config.algorithm, job.config.rollout
    if algorithm.reference:
        model.policy.keep_reference()
    return RLParts(
        run=run,
        sampler=sampler,
        collector=model.collector,
        sampling=Sampling(
            rollout.temperature, rollout.top_p, rollout.max_response_tokens, rollout.group_size
        ),
        advantages=partial(
            with_advantages,
            kind=algorithm.advantage,
            deviation=algorithm.advantage_std,
            task_of=partial(_task_of, tasks=job.config.curriculum.tasks),
            max_tokens=rollout.max_response_tokens,
            buffer_tokens=algorithm.overlong_buffer_tokens,
        ),
        trainer=Trainer(
            model.policy,
            config=job.config.policy,
            optimizer_config=job.config.optimizer,
            loss=PolicyLoss(
                algorithm, partial(dist.all_reduce, group=model.policy.context.cp.group)
            ),
            aggregation=algorithm.aggregation,
            constant_tokens=rollout.max_response_tokens,
            updates_per_step=algorithm.updates_per_step,
            total_steps=run.total_steps,
            use_reference=algorithm.reference,
            reference_every=algorithm.reference_every,
            permit=run.monitor.permit,
            entropy_control=EntropyControl(band) if (band := algorithm.entropy_band) else None,
        ),
    )


def _task_of(prompt: Prompt, *, tasks: Mapping[str, float]) -> str:
    """Returns the task whose rewards `algorithm.advantage_std=task` puts together."""
    return task_of(prompt.data_source, tasks) if tasks else prompt.data_source


def make_sft_trainer(job: Job, model: Model, run: Run) -> Trainer:
    return Trainer(
        model.policy,
        config=job.config.policy,
        optimizer_config=job.config.optimizer,
        loss=sft_loss,
        aggregation=job.config.sft.aggregation,
        constant_tokens=1,  # the aggregations of SFT do not read it
        updates_per_step=1,
        total_steps=run.total_steps,
        use_reference=False,
        reference_every=1,
        permit=run.monitor.permit,
    )
