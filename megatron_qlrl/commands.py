"""What the command line calls, once on every rank: the table of contents of each command."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_qlrl import build
from megatron_qlrl.config.run_folder import step_of
from megatron_qlrl.config.schema import Config, ModelConfig, PolicyConfig
from megatron_qlrl.config.shape import ModelShape, read_shape
from megatron_qlrl.curriculum.sampler import Sampler
from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.evaluate.evaluation import evaluation_sampling
from megatron_qlrl.evaluate.sample import report, sample_prompts, spread
from megatron_qlrl.evaluate.statistics import score_lines
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.parallel.collectives import gather_objects, on_all_ranks
from megatron_qlrl.parallel.context import init_parallel, process_group
from megatron_qlrl.parallel.job import job_on
from megatron_qlrl.platform.device import weight_dtype
from megatron_qlrl.platform.env import (
    init_ranks,
    job_ends_at,
    listen,
    longest_step_s,
    read_ranks,
)
from megatron_qlrl.platform.megatron_cpu import megatron_device
from megatron_qlrl.platform.stop import StopSignals
from megatron_qlrl.policy.model import build_model
from megatron_qlrl.release.bytes import compare_companions, compare_weights
from megatron_qlrl.release.card import model_card
from megatron_qlrl.release.record import Record, read_record, training_facts
from megatron_qlrl.release.static import Check, run_check
from megatron_qlrl.report.write import report_at_end
from megatron_qlrl.rl import train_rl
from megatron_qlrl.rollout.seeds import EVALUATION_STEP
from megatron_qlrl.sft import num_sft_steps, train_sft
from megatron_qlrl.train.inputs import read_examples, read_train_prompts
from megatron_qlrl.train.parent import Parent, find_parent, parent_of, same_rows, with_parent
from megatron_qlrl.train.phases import (
    Handover,
    Phase,
    PhaseGroup,
    fresh_steps,
    make_phases,
    phase_group_at,
    reference_folder,
)
from megatron_qlrl.train.recorder import newest_checkpoint, save_checkpoint
from megatron_qlrl.train.run import Run
from megatron_qlrl.train.run_log import RunLog
from megatron_qlrl.weights.checkpoint import CheckpointStore, load_weights
from megatron_qlrl.weights.checkpoint_folder import (
    check_resumable,
    is_checkpoint,
    read_state,
    taking_up,
    torn,
)
from megatron_qlrl.weights.release import write_release
from megatron_qlrl.weights.stream import WeightStream

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run_rl(config: Config) -> Handover | None:
    """RL from the newest checkpoint on, or at first from the parent's, through all phases that can
    share a process.

    Returns:
        What the next phases need, which new processes go on with, or None at the end of the run,
        which leaves a Hugging Face folder.
    """
    with _stop_signals(longest_s=longest_step_s()) as stop, job_on(Path(config.run.dir)) as held:
        newest = _newest(config, "rl")
        if newest is not None:
            parent = on_all_ranks(partial(parent_of, newest, config))
        else:
            parent = find_parent(config, warn=partial(print, "qlrl: warning:", flush=True))
        config = with_parent(config, parent)
        group = phase_group_at(config, step_of(newest) if newest else 0)
        handover = _run_phases(config, group, stop, newest=newest, parent=parent)
        if handover is not None:
            held.pop_all()
        return handover


def _run_phases(
    config: Config,
    group: PhaseGroup,
    stop: StopSignals,
    *,
    newest: Path | None,
    parent: Parent | None,
) -> Handover | None:
    check_resumable(group.config.policy)
    job = build.make_job(group.config, config)
    with job.progress.doing("reading the prompts"):
        prompts, rows = on_all_ranks(
            partial(read_train_prompts, config, job.tokenizer, warn=job.warn)
        )
    sampler = on_all_ranks(partial(build.make_sampler, job, prompts))
    origin = parent if newest is None else None  # the parent is loaded at the first start alone
    weights = origin.checkpoint if origin else reference_folder(config, group.phases[0].index)
    with build.open_run(
        job,
        "rl",
        newest=newest,
        rows=rows,
        stop=stop,
        total_steps=config.total_rl_steps,
        temperature=group.config.rollout.temperature,
        weights=weights,
        fresh_steps=fresh_steps(config),
        parent=parent,
    ) as (model, run):
        parts = build.make_rl_parts(job, model, run, sampler)
        steps_done = 0
        if origin is not None:
            _start_from(origin, job, run, sampler, rows)
        else:
            state = run.recorder.start(newest)
            if newest is not None:
                with taking_up(newest):
                    sampler.load_state_dict(state["sampler"])
                    parts.trainer.load_state_dict(state.get("trainer", {}))
                steps_done = state["step"]
        run.begin(make_phases(config), steps_done)
        train_rl(parts, group.phases, first_step=steps_done)
        if group.is_last or run.exhausted:
            _finish(job, run)
            return None
        run.recorder.store.wait()
        run.stop_if_asked(group.phases[-1].end_step)
        listener = listen() if job.context.rank == 0 else None
        port = gather_objects(listener.getsockname()[1] if listener else 0)[0]
        return Handover(port, listener.detach() if listener else None, stop.longest_s)


def _start_from(parent: Parent, job: build.Job, run: Run, sampler: Sampler, rows: str) -> None:
    """Takes over what a new run has from its parent, and says what that is."""
    path = parent.checkpoint
    state = run.recorder.start_from(path, reference=reference_folder(job.whole, 0))
    if state["command"] != "rl":
        known = "no statistics of prompts, because SFT keeps none"
    elif not same_rows(state, rows):
        known = "no statistics of prompts, because the training data are not the same"
    else:
        with taking_up(path):
            num = sampler.curriculum.inherit(state["sampler"]["curriculum"])
        known = f"statistics of {num} prompts"
    resets = job.whole.phases[0].optimizer_state == "reset"
    optimizer = "a new optimizer state" if resets else "its optimizer state"
    if job.leads:
        print(f"qlrl: starts from {path}: its weights, {optimizer}, {known}", flush=True)


def run_sft(config: Config) -> None:
    """Warm-up SFT, from the newest checkpoint on; ends with a Hugging Face folder."""
    sft = config.sft
    with _stop_signals() as stop, job_on(Path(config.run.dir)):
        newest = _newest(config, "sft")
        check_resumable(config.policy)
        job = build.make_job(config)
        with job.progress.doing("reading the SFT rows"):
            examples, rows = on_all_ranks(partial(read_examples, config, job.tokenizer))
        steps = num_sft_steps(
            len(examples), batch_size=sft.batch_size, epochs=sft.epochs, max_steps=sft.max_steps
        )
        phase = Phase(0, "sft", 0, steps)
        with build.open_run(
            job, "sft", newest=newest, rows=rows, stop=stop, total_steps=steps, temperature=1.0
        ) as (model, run):
            trainer = build.make_sft_trainer(job, model, run)
            steps_done = run.recorder.start(newest).get("step", 0)
            run.begin([phase], steps_done)
            train_sft(
                run,
                trainer,
                examples,
                phase,
                first_step=steps_done,
                batch_size=sft.batch_size,
                seed=config.run.seed,
            )
            _finish(job, run)


def _finish(job: build.Job, run: Run) -> None:
    """Leaves a Hugging Face folder, and a page about the run, without which it succeeded, too."""
    if run.exhausted and job.leads:
        ranking = run.evaluation.ranking
        print(
            f"qlrl: the run ends early: {job.config.evaluation.patience} evaluations in a row were "
            f"not better than the best one, {ranking.best}; the last one: {ranking.last}",
            flush=True,
        )
    best = job.config.checkpoint.release == "best"
    write = run.recorder.release_best if best else run.recorder.release
    write(job.folder / "hf")
    if job.leads and (problem := report_at_end(job.folder)):
        job.warn(f"no report was written ({problem}); `qlrl report {job.folder}` tries again")


def _newest(config: Config, command: str) -> Path | None:
    if not config.checkpoint.resume:
        return None
    return newest_checkpoint(build.make_store(config), command)


def _stop_signals(*, longest_s: float = 0.0) -> StopSignals:
    # Under the launcher of `--processes` it is the launcher that meets Ctrl-C.
    return StopSignals(job_ends_at(), longest_s=longest_s, speaks=read_ranks().rank == 0)


def run_eval(config: Config) -> None:
    """Scores model.path on data.eval_files; writes eval/eval.json and the answers."""
    with job_on(Path(config.run.dir)):
        job = build.make_job(config)
        scorer, benchmarks = build.make_scorer(job), build.read_held_out(job)
        log = RunLog(config, is_writer=job.leads)
        log.record_start(world_size=job.context.world_size)
        with (
            closing(build.open_journal(job)) as journal,
            build.open_model(job, scorer, temperature=1.0) as model,
        ):
            evaluation = build.make_evaluation(job, model.collector, benchmarks, log, journal)
            metrics = evaluation.score("eval", 0)
            if job.leads:
                print(
                    "\n".join([*score_lines(metrics, list(benchmarks)), json.dumps(metrics)]),
                    flush=True,
                )
            gather_objects(None)  # no rank leaves before the last one has ended


def run_sample(config: Config, num: int, folder: Path) -> None:
    """Prints `num` prompts, the greedy answers of model.path, and their scores. Where phases have
    settings of their own, those of the last one hold: its prompts are the longest.

    Args:
        folder: for what a run writes beside its result; the caller removes it.

    Raises:
        ConfigError: a run with these settings could not resume.
    """
    config = config.phase_configs()[-1]
    check_resumable(config.policy)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})})
    greedy = config.evaluation.model_copy(update={"temperature": 0.0, "top_p": 1.0, "samples": 1})
    sampling = evaluation_sampling(greedy, config.rollout.max_response_tokens)
    with job_on(folder):
        job = build.make_job(config)
        read = partial(
            sample_prompts,
            config,
            job.tokenizer,
            max_positions=job.shape.max_positions,
            warn=job.warn,
        )
        with job.progress.doing("reading the prompts"):
            prompts = spread(on_all_ranks(read), num)
        with (
            build.open_model(job, build.make_scorer(job), temperature=1.0) as model,
            model.collector.session(sampling, step=EVALUATION_STEP, meter=Meter()) as collect,
        ):
            with job.progress.doing(f"answering {len(prompts)} prompts"):
                groups = collect(prompts)
            if job.leads:
                print(report(groups, job.tokenizer), flush=True)


@dataclass(frozen=True)
class _Export:
    """A checkpoint that is loaded: its folder, the type and shape of its model, its weights."""

    source: Path
    record: Record
    dtype: str
    shape: ModelShape
    stream: WeightStream


@contextmanager
def _exported(checkpoint: Path) -> Iterator[_Export]:
    """Loads a checkpoint, or the newest one of a run's folder, on this process alone."""
    ranks = init_ranks()
    with process_group(rank=0, local_rank=ranks.local_rank, world_size=1):
        source = _checkpoint_in(checkpoint)
        with taking_up(source):
            state = read_state(source)
            dtype = state["dtype"]
            torch_dtype = _DTYPES[dtype]
            record = read_record(
                state["facts"],
                command=state["command"],
                steps_done=state["step"],
                folder=source.parent.parent,
            )
        context = init_parallel(tp=1, pp=1, cp=1, seed=0)
        shape = read_shape(source / "hf", rope_scaling=None)
        with megatron_device():
            model = build_model(shape, PolicyConfig(), dtype=torch_dtype, context=context)  # pyright: ignore[reportCallIssue]
        load_weights(source, model=model)
        stream = WeightStream(model, shape=shape, context=context, bucket_bytes=2**29)
        yield _Export(source, record, dtype, shape, stream)


def run_export(checkpoint: Path, out: Path) -> None:
    """A checkpoint (or the newest one of a run's folder) as a Hugging Face folder."""
    with _exported(checkpoint) as export:
        write_release(
            export.stream,
            out,
            companions=export.source / "hf",
            card=partial(model_card, export.record),
            writer=True,
            dtype=export.dtype,
            positions=export.shape.position_fields(),
        )


def run_release_compare(checkpoint: Path, folder: Path) -> list[Check]:
    """Compares a release with the checkpoint (or the newest one of a run's folder), byte for
    byte."""
    with _exported(checkpoint) as export:
        companions = partial(compare_companions, folder, export.source)
        weights = partial(
            compare_weights, folder, export.stream, shape=export.shape, checkpoint=export.source
        )
        return [
            run_check("config and tokenizer, byte for byte", companions),
            run_check("weights, byte for byte", weights),
        ]


def _checkpoint_in(folder: Path) -> Path:
    """The checkpoint in `folder`: itself, or the newest one where it is a run's."""
    if is_checkpoint(folder):
        if problem := torn(folder):
            raise CheckpointError(
                f"checkpoint {folder} is not whole: {problem}; export another one, or copy it "
                "again from where it was written"
            )
        return folder
    newest = CheckpointStore(folder / "checkpoints", keep=1, warn=print).newest()
    if newest is None:
        raise CheckpointError(f"{folder} is no checkpoint and has no whole one in checkpoints/")
    return newest


def run_import(hf_folder: Path, out: Path, tp: int, pp: int) -> None:
    """A Hugging Face folder as a Megatron checkpoint that any layout can load."""
    config = Config(
        model=ModelConfig(path=str(hf_folder)),
        policy=PolicyConfig(tp=tp, pp=pp),  # pyright: ignore[reportCallIssue]
    )
    ranks = init_ranks()
    with process_group(rank=ranks.rank, local_rank=ranks.local_rank, world_size=ranks.world_size):
        policy = build.make_policy(
            config,
            read_shape(hf_folder, rope_scaling=None),
            build.make_context(config),
            temperature=1.0,
            weights=hf_folder,
        )
        store = CheckpointStore(out / "checkpoints", keep=1, warn=print)
        save_checkpoint(
            store,
            policy,
            0,
            companions=hf_folder,
            dtype=weight_dtype(config.model.dtype),
            facts=training_facts(config),
            state={"command": "import"},
        )
        store.wait()
