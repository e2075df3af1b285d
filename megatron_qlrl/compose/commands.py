"""What the command line calls, once on every rank: the table of contents of each command."""

import json
from functools import partial
from pathlib import Path

import torch

from megatron_qlrl.compose.data import read_examples, read_train_prompts
from megatron_qlrl.compose.fingerprint import rows_digest
from megatron_qlrl.compose.parts import (
    make_advantages,
    make_context,
    make_curriculum,
    make_policy,
    newest_checkpoint,
    policy_loss,
    save_checkpoint,
)
from megatron_qlrl.compose.run import joined, open_run
from megatron_qlrl.compose.stretch import (
    Handover,
    Stretch,
    fresh_steps,
    make_phases,
    reference_folder,
    renews_reference,
    stretch_at,
)
from megatron_qlrl.config.schema import Config, ModelConfig, PolicyConfig
from megatron_qlrl.config.shape import read_shape
from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.loop import run_phases
from megatron_qlrl.parallel.collectives import gather_objects, on_all_ranks
from megatron_qlrl.parallel.context import init_parallel, process_group
from megatron_qlrl.platform.env import (
    free_port,
    init_ranks,
    job_ends_at,
    longest_step_s,
    read_ranks,
)
from megatron_qlrl.platform.megatron_cpu import megatron_device
from megatron_qlrl.platform.stop import StopSignals
from megatron_qlrl.policy.loss import sft_loss
from megatron_qlrl.policy.model import build_model
from megatron_qlrl.sft import num_sft_steps, run_sft_steps
from megatron_qlrl.weights.checkpoint import CheckpointStore, load_weights
from megatron_qlrl.weights.checkpoint_folder import (
    is_checkpoint,
    read_state,
    step_of,
    taking_up,
    torn,
)
from megatron_qlrl.weights.release import write_release
from megatron_qlrl.weights.stream import WeightStream

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run_rl(config: Config) -> Handover | None:
    """RL from the newest checkpoint on, through all phases that can share a process.

    Returns:
        None at the end of the run, which leaves a Hugging Face folder; else what the next phases
        need, which fresh processes go on with.
    """
    folder = Path(config.run.dir)
    with _stop_signals(longest_s=longest_step_s()) as stop, joined(folder) as held:
        newest = newest_checkpoint(config, "rl")
        stretch = stretch_at(config, step_of(newest) if newest else 0)
        handover = _run_stretch(config, stretch, newest, stop)
        if handover is not None:
            held.pop_all()
        return handover


def _run_stretch(
    whole: Config, stretch: Stretch, newest: Path | None, stop: StopSignals
) -> Handover | None:
    config, begin = stretch.config, stretch.phases[0]
    with open_run(
        config,
        "rl",
        temperature=config.rollout.temperature,
        whole=whole,
        weights=reference_folder(whole, begin.index),
        give_up=stop.within_step,
    ) as run:
        with run.progress.doing("reading the prompts"):
            read = partial(read_train_prompts, whole, run.tokenizer, warn=run.warn)
            prompts, rows = on_all_ranks(read)
            run.identify(newest, rows=rows)
        run.read_benchmarks()
        curriculum = on_all_ranks(partial(make_curriculum, whole, config.curriculum, prompts))
        if config.algorithm.reference:
            run.policy.keep_reference()
        state = run.restore(newest, fresh_steps=fresh_steps(whole))
        run.evaluation.before_training(state)
        sampler = run.sampler(curriculum)
        if newest:
            with taking_up(newest):
                sampler.load_state_dict(state["sampler"])
        trainer = run.trainer(policy_loss(config), total_updates=whole.total_rl_steps)
        first = state.get("step", 0)
        for phase in make_phases(whole):
            if phase.first_step < first <= phase.end_step:
                run.evaluation.after(first, phase.name, last=first == phase.end_step)
        total = whole.total_rl_steps
        run.stop_if_asked(stop.between_steps(total - first))
        for phase, report, groups in run.watched(
            run_phases(
                stretch.phases,
                first_step=first,
                prompts_per_step=config.rollout.prompts_per_step,
                updates_per_step=config.algorithm.updates_per_step,
                sampler=sampler,
                advantages=make_advantages(config),
                trainer=trainer,
                monitor=run.monitor,
            )
        ):
            run.log(report, groups)
            if run.went_back():
                sampler.release()
            run.reached(report.step + 1, {"sampler": sampler.state_dict()})
            stop.step_done()
            last = report.step == phase.end_step - 1
            if last and renews_reference(whole, phase.index + 1):
                # Before anything that may end the run with a checkpoint: the next phase needs it.
                run.release(reference_folder(whole, phase.index + 1))
            run.stop_if_unstable()
            run.evaluation.after(report.step + 1, phase.name, last=last)
            if last or (report.step + 1) % config.checkpoint.every_steps == 0:
                run.save()
            run.stop_if_asked(stop.between_steps(total - report.step - 1))
        if not stretch.is_last:
            run.store.wait()  # may take long: only then is the port drawn that must be free
            run.stop_if_asked(stop.between_steps(total - stretch.phases[-1].end_step))
            return Handover(gather_objects(free_port())[0], stop.longest_s)
        run.release(run.folder / "hf")
        return None


def run_sft(config: Config) -> None:
    """Warm-up SFT, from the newest checkpoint on; ends with a Hugging Face folder."""
    sft = config.sft
    with (
        _stop_signals() as stop,
        joined(Path(config.run.dir)),
        open_run(config, "sft", temperature=1.0, give_up=stop.within_step) as run,
    ):
        with run.progress.doing("reading the SFT rows"):
            examples = on_all_ranks(partial(read_examples, config, run.tokenizer))
            newest = newest_checkpoint(config, "sft")
            responses = [e.response_ids for e in examples]
            run.identify(newest, rows=rows_digest((e.prompt for e in examples), responses))
        run.read_benchmarks()
        steps = num_sft_steps(
            len(examples), batch_size=sft.batch_size, epochs=sft.epochs, max_steps=sft.max_steps
        )
        state = run.restore(newest)
        run.evaluation.before_training(state)
        trainer = run.trainer(sft_loss, total_updates=steps, aggregation=sft.aggregation)
        first = state.get("step", 0)
        if first:
            run.evaluation.after(first, "sft", last=first == steps)
        run.stop_if_asked(stop.between_steps(steps - first))
        for report in run.watched(
            run_sft_steps(
                examples,
                first_step=first,
                num_steps=steps,
                batch_size=sft.batch_size,
                seed=config.run.seed,
                pack=trainer.pack,
                update=trainer.update,
                monitor=run.monitor,
            )
        ):
            run.log(report, [])
            run.went_back()
            run.reached(report.step + 1, {})
            stop.step_done()
            run.stop_if_unstable()
            last = report.step == steps - 1
            run.evaluation.after(report.step + 1, "sft", last=last)
            if last or (report.step + 1) % config.checkpoint.every_steps == 0:
                run.save()
            run.stop_if_asked(stop.between_steps(steps - report.step - 1))
        run.release(run.folder / "hf")


def _stop_signals(*, longest_s: float = 0.0) -> StopSignals:
    # Under the launcher of `--processes` it is the launcher that meets Ctrl-C.
    return StopSignals(job_ends_at(), longest_s=longest_s, speaks=read_ranks().rank == 0)


def run_eval(config: Config) -> None:
    """Scores model.path on data.eval_files; writes eval/eval.json and the answers."""
    folder = Path(config.run.dir)
    with joined(folder), open_run(config, "eval", temperature=1.0) as run:
        run.record_start()
        run.read_benchmarks()
        metrics = run.evaluation.score("eval", 0)
        if run.leads:
            print(json.dumps(metrics), flush=True)


def run_export(checkpoint: Path, out: Path) -> None:
    """A checkpoint (or the newest one of a run's folder) as a Hugging Face folder."""
    ranks = init_ranks()
    with process_group(rank=0, local_rank=ranks.local_rank, world_size=1):
        source = _checkpoint_in(checkpoint)
        with taking_up(source):
            state = read_state(source)
            facts, dtype = state["facts"], _DTYPES[state["dtype"]]
        context = init_parallel(tp=1, pp=1, cp=1, seed=0)
        shape = read_shape(source / "hf", rope_scaling=None)
        with megatron_device():
            model = build_model(shape, PolicyConfig(), dtype=dtype, context=context)  # pyright: ignore[reportCallIssue]
        load_weights(source, model=model)
        stream = WeightStream(model, shape=shape, context=context, bucket_bytes=2**29)
        write_release(
            stream, out, companions=source / "hf", facts=facts, writer=True,
            dtype=state["dtype"], positions=shape.position_fields(),
        )  # fmt: skip


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
        context = make_context(config)
        shape = read_shape(hf_folder, rope_scaling=None)
        policy = make_policy(config, shape, context, temperature=1.0, weights=hf_folder)
        store = CheckpointStore(out / "checkpoints", keep=1, warn=print)
        save_checkpoint(store, policy, 0, hf_folder, config, {"command": "import"})
        store.wait()
