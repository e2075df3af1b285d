"""Composition root: the only place that sees the whole config and joins the stages.

run_sft, run_rl, run_eval, run_export, run_import are what the command line calls, once on
every rank.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from megatron_qlrl import __version__
from megatron_qlrl.advantage.filters import has_spread
from megatron_qlrl.advantage.group import group_advantages
from megatron_qlrl.config.load import save_config
from megatron_qlrl.config.schema import Config, ModelConfig, PolicyConfig
from megatron_qlrl.config.shape import ModelShape, read_shape
from megatron_qlrl.curriculum.phases import PhaseSampler
from megatron_qlrl.data.dataset import (
    check_lengths,
    load_examples,
    load_prompts,
    middle_truncate,
)
from megatron_qlrl.errors import CheckpointError, ConfigError, DataError
from megatron_qlrl.evaluate.benchmarks import evaluate
from megatron_qlrl.loop import Phase, Trainer, run_phases
from megatron_qlrl.metrics.sinks import Tracker
from megatron_qlrl.packing.microbatch import make_rows
from megatron_qlrl.packing.shard import shard_row
from megatron_qlrl.parallel.collectives import gather_objects, on_all_ranks
from megatron_qlrl.parallel.context import ParallelContext, init_parallel, process_group
from megatron_qlrl.platform.device import has_gpu
from megatron_qlrl.platform.env import init_ranks, set_engine_env
from megatron_qlrl.platform.megatron_cpu import megatron_device
from megatron_qlrl.policy.loss import PolicyLoss, sft_loss
from megatron_qlrl.policy.model import build_model
from megatron_qlrl.policy.optimizer import learning_rate
from megatron_qlrl.policy.step import Loss, Policy
from megatron_qlrl.reward.score import check_sources, score_group
from megatron_qlrl.rollout.sampler import sample_groups, share_prompts
from megatron_qlrl.rollout.vllm_engine import Sampling, VllmEngine
from megatron_qlrl.sft import num_sft_steps, run_sft_steps
from megatron_qlrl.types import PackedRow, Prompt, ScoredGroup, StepReport, TrainGroup
from megatron_qlrl.weights.checkpoint import CheckpointStore, load_checkpoint, load_weights
from megatron_qlrl.weights.hf_map import hf_shapes
from megatron_qlrl.weights.release import copy_companions, write_release
from megatron_qlrl.weights.stream import WeightStream, load_hf, untied

EVALUATION_STEP = -1
"""Seeds of evaluation are drawn at this step, so that they never meet those of training."""


def run_rl(config: Config) -> None:
    """All phases of RL, from the newest checkpoint on; ends with a Hugging Face folder."""
    with open_run(config, temperature=config.rollout.temperature) as run:
        prompts = on_all_ranks(run.train_prompts)
        benchmarks = on_all_ranks(run.benchmarks)
        samplers = on_all_ranks(partial(_samplers, config, prompts))
        if config.algorithm.reference:
            run.policy.keep_reference()
        state = run.restore()
        run.evaluate_start(benchmarks, state)
        for sampler, saved in zip(samplers, state.get("samplers", []), strict=False):
            sampler.load_state_dict(saved)
        trainer = run.trainer(_policy_loss(config), total_updates=config.total_rl_steps)
        for phase, report, groups in run_phases(
            _phases(config, samplers),
            first_step=state.get("step", 0),
            prompts_per_step=config.rollout.prompts_per_step,
            updates_per_step=config.algorithm.updates_per_step,
            collect=run.collect,
            advantages=partial(group_advantages, kind=config.algorithm.advantage),
            keep=has_spread if config.algorithm.filter_groups else lambda rewards: True,
            trainer=trainer,
        ):
            run.log(report, groups)
            last = report.step == phase.end_step - 1
            if last and config.evaluation.at_phase_end:
                run.evaluate(benchmarks, phase.name, report.step)
            if last or (report.step + 1) % config.checkpoint.every_steps == 0:
                run.save(report.step + 1, {"samplers": [s.state_dict() for s in samplers]})
        run.release()


def run_sft(config: Config) -> None:
    """Warm-up SFT, from the newest checkpoint on; ends with a Hugging Face folder."""
    sft = config.sft
    with open_run(config, temperature=1.0) as run:
        examples = on_all_ranks(run.examples)
        benchmarks = on_all_ranks(run.benchmarks)
        steps = num_sft_steps(
            len(examples), batch_size=sft.batch_size, epochs=sft.epochs, max_steps=sft.max_steps
        )
        state = run.restore()
        run.evaluate_start(benchmarks, state)
        trainer = run.trainer(sft_loss, total_updates=steps, aggregation=sft.aggregation)
        for report in run_sft_steps(
            examples,
            first_step=state.get("step", 0),
            num_steps=steps,
            batch_size=sft.batch_size,
            seed=config.run.seed,
            pack=trainer.pack,
            update=trainer.update,
        ):
            run.log(report, [])
            last = report.step == steps - 1
            if last and config.evaluation.at_phase_end:
                run.evaluate(benchmarks, "sft", report.step)
            if last or (report.step + 1) % config.checkpoint.every_steps == 0:
                run.save(report.step + 1, {})
        run.release()


def run_eval(config: Config) -> None:
    """Scores model.path on data.eval_files; writes eval/eval.json and the answers."""
    with open_run(config, temperature=1.0) as run:
        metrics = run.evaluate(on_all_ranks(run.benchmarks), "eval", 0)
        if run.leads:
            print(json.dumps(metrics), flush=True)


def run_export(checkpoint: Path, out: Path) -> None:
    """A checkpoint (or the newest one of a run's folder) as a Hugging Face folder."""
    ranks = init_ranks()
    with process_group(rank=0, local_rank=ranks.local_rank, world_size=1):
        source = checkpoint
        if not (source / "state.json").is_file():
            newest = CheckpointStore(checkpoint / "checkpoints", keep=1, warn=print).newest()
            if newest is None:
                raise CheckpointError(f"{checkpoint} is no checkpoint and has none in checkpoints/")
            source = newest
        state = json.loads((source / "state.json").read_text())
        context = init_parallel(tp=1, pp=1, cp=1, seed=0)
        shape = read_shape(source / "hf")
        dtype = getattr(torch, state["dtype"])
        with megatron_device():
            model = build_model(shape, PolicyConfig(), dtype=dtype, context=context)  # pyright: ignore[reportCallIssue]
        load_weights(source, model=model)
        stream = WeightStream(model, shape=shape, context=context, bucket_bytes=2**29)
        write_release(
            stream, out, companions=source / "hf", facts=state["facts"], writer=True,
            dtype=state["dtype"],
        )  # fmt: skip


def run_import(hf_folder: Path, out: Path, tp: int, pp: int) -> None:
    """A Hugging Face folder as a Megatron checkpoint that any layout can load."""
    config = Config(
        model=ModelConfig(path=str(hf_folder)),
        policy=PolicyConfig(tp=tp, pp=pp),  # pyright: ignore[reportCallIssue]
    )
    ranks = init_ranks()
    with process_group(rank=ranks.rank, local_rank=ranks.local_rank, world_size=ranks.world_size):
        policy = _policy(config, read_shape(hf_folder), temperature=1.0)
        store = CheckpointStore(out / "checkpoints", keep=1, warn=print)
        _save(store, policy, 0, hf_folder, config, {})


@contextmanager
def open_run(config: Config, *, temperature: float) -> Iterator["Run"]:
    """Process group, policy, trackers; the engine follows at its first use."""
    ranks = init_ranks()
    set_engine_env(cpu_kv_cache_gib=config.rollout.cpu_kv_cache_gib)
    with process_group(rank=ranks.rank, local_rank=ranks.local_rank, world_size=ranks.world_size):
        run = Run(config, temperature=temperature)
        try:
            yield run
        finally:
            run.close()


class Run:
    """The parts of one run, joined. Methods are collective unless they say otherwise."""

    def __init__(self, config: Config, *, temperature: float) -> None:
        self.config = config
        self.folder = Path(config.run.dir)
        self.shape = _shape(config)
        self.policy = _policy(config, self.shape, temperature=temperature)
        self.context = self.policy.context
        self.leads = self.context.rank == 0
        self.tokenizer = _tokenizer(Path(config.model.path))
        self.tracker = Tracker.silent()
        self.store = CheckpointStore(
            self.folder / "checkpoints",
            keep=config.checkpoint.keep,
            warn=print if self.leads else lambda _: None,
        )
        self.stream = WeightStream(
            self.policy.model,
            shape=self.shape,
            context=self.context,
            bucket_bytes=config.rollout.sync_bucket_mib * 2**20,
        )
        self.scores: dict[str, float] = {}
        if self.leads:
            save_config(config, self.folder / "config.yaml")

    def close(self) -> None:
        self.tracker.close()
        if "engine" in self.__dict__:
            self.engine.close()

    # --- data ---------------------------------------------------------------------------

    def train_prompts(self) -> list[Prompt]:
        """RL prompts; every one must fit the last phase (not collective)."""
        prompts = self._prompts(self.config.data.train_files)
        check_sources(prompts)
        check_lengths(prompts, self.config.max_input_tokens)
        return prompts

    def benchmarks(self) -> dict[str, list[Prompt]]:
        """Held-out prompts by file stem, cut in the middle to the limit (not collective)."""
        limit = self.config.evaluation.max_input_tokens
        found = {Path(f).stem: self._prompts([f]) for f in self.config.data.eval_files}
        check_sources([p for prompts in found.values() for p in prompts])
        return {
            name: [replace(p, token_ids=middle_truncate(p.token_ids, limit)) for p in prompts]
            for name, prompts in found.items()
        }

    def examples(self) -> Any:
        """SFT rows; every one must fit into a packed row (not collective)."""
        data = self.config.data
        examples = load_examples(
            data.sft_files, tokenizer=self.tokenizer, enable_thinking=data.enable_thinking
        )
        limit = self.config.policy.max_tokens_per_row
        for e in examples:
            if e.prompt.num_tokens + len(e.response_ids) > limit:
                raise DataError(
                    f"SFT row {e.prompt.uid} has {e.prompt.num_tokens + len(e.response_ids)} "
                    f"tokens, more than policy.max_tokens_per_row={limit}"
                )
        return examples

    def _prompts(self, files: Sequence[str]) -> list[Prompt]:
        return load_prompts(
            files, tokenizer=self.tokenizer, enable_thinking=self.config.data.enable_thinking
        )

    # --- rollout ------------------------------------------------------------------------

    @cached_property
    def engine(self) -> VllmEngine:
        config, rollout = self.config, self.config.rollout
        longest = config.max_input_tokens or config.evaluation.max_input_tokens
        if config.data.eval_files:
            longest = max(longest, config.evaluation.max_input_tokens)
        return VllmEngine(
            Path(config.model.path),
            tp=rollout.tp,
            rank=self.context.rank,
            world_size=self.context.world_size,
            dtype=_dtype(config),
            max_model_len=min(longest + rollout.max_response_tokens, self.shape.max_positions),
            stop_token_ids=_stop_tokens(Path(config.model.path), self.tokenizer),
            manifest=hf_shapes(replace(self.shape, tied=False)),
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            rope=self.shape.rope if config.model.rope_scaling else None,
            seed=config.run.seed,
        )

    def collect(self, prompts: Sequence[Prompt], step: int) -> list[ScoredGroup]:
        rollout = self.config.rollout
        sampling = Sampling(rollout.temperature, rollout.top_p, rollout.max_response_tokens)
        return self._generate(prompts, step, sampling, rollout.group_size)

    def _generate(
        self, prompts: Sequence[Prompt], step: int, sampling: Sampling, samples: int
    ) -> list[ScoredGroup]:
        """Every engine generates and scores its share; all ranks get all groups, in order."""
        engine = self.engine
        share = share_prompts(prompts, engine.num_engines)[engine.engine_index]
        mine = [prompts[i] for i in share]
        with engine.awake(untied(self.stream)) as generate:
            found = sample_groups(
                mine,
                generate,
                group_size=samples,
                sampling=sampling,
                run_seed=self.config.run.seed,
                step=step,
                weight_version=self.policy.version,
                decode=partial(self.tokenizer.decode, skip_special_tokens=True),
            )

        def score() -> dict[int, ScoredGroup]:
            if not engine.leads:
                return {}
            return {
                index: score_group(prompt, rollouts)
                for index, prompt, rollouts in zip(share, mine, found, strict=True)
            }

        parts = gather_objects(on_all_ranks(score))
        merged = {index: group for part in parts for index, group in part.items()}
        return [merged[i] for i in range(len(prompts))]

    def evaluate_start(
        self, benchmarks: Mapping[str, list[Prompt]], state: Mapping[str, Any]
    ) -> None:
        if self.config.evaluation.before_training and not state:
            self.evaluate(benchmarks, "start", 0)

    def evaluate(
        self, benchmarks: Mapping[str, list[Prompt]], name: str, step: int
    ) -> dict[str, float]:
        """Scores the held-out files; writes eval/<name>.json and, in .jsonl, the answers."""
        if not benchmarks:
            return {}
        settings = self.config.evaluation
        sampling = Sampling(
            settings.temperature, settings.top_p, self.config.rollout.max_response_tokens
        )
        answers: list[ScoredGroup] = []

        def rollout(prompts: Sequence[Prompt]) -> list[ScoredGroup]:
            groups = self._generate(prompts, EVALUATION_STEP, sampling, settings.samples)
            answers.extend(groups)
            return groups

        metrics = evaluate(benchmarks, rollout)
        self.scores |= {f"{name}: {k}": v for k, v in metrics.items() if k.endswith("/score")}
        self.tracker.log(step, metrics)
        if self.leads:
            folder = self.folder / "eval"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(metrics, indent=1))
            with (folder / f"{name}.jsonl").open("w") as out:
                for record, rollout in zip(
                    _records(answers), (r for g in answers for r in g.rollouts), strict=True
                ):
                    record["token_ids"] = rollout.token_ids.tolist()
                    record["logprobs"] = rollout.engine_logprobs.tolist()
                    out.write(json.dumps(record) + "\n")
        return metrics

    # --- training -----------------------------------------------------------------------

    def trainer(self, loss: Loss, *, total_updates: int, aggregation: Any = None) -> Trainer:
        config, policy = self.config, self.policy
        updates = config.algorithm.updates_per_step

        def pack(groups: Sequence[TrainGroup]) -> list[PackedRow]:
            return make_rows(
                groups,
                num_ranks=self.context.dp.size,
                max_tokens=config.policy.max_tokens_per_row,
                share_prompts=config.policy.share_prompts,
                aggregation=aggregation or config.algorithm.aggregation,
                constant_tokens=config.rollout.max_response_tokens,
                cost=partial(_row_flops, self.shape),
            )[self.context.dp.rank]

        def update(rows: Sequence[PackedRow], number: int) -> dict[str, float]:
            total = total_updates if aggregation else total_updates * updates
            rate = learning_rate(config.optimizer, step=number, total_steps=total)
            return policy.update(rows, loss, lr=rate)

        keeps = config.algorithm.reference and aggregation is None
        return Trainer(pack, policy.add_logprobs, policy.as_reference if keeps else None, update)

    # --- record -------------------------------------------------------------------------

    def restore(self) -> dict[str, Any]:
        """Newest good checkpoint into the policy; its state ({} for a fresh start)."""
        config = self.config
        path = self.store.newest() if config.checkpoint.resume else None
        state: dict[str, Any] = {}
        if path is not None:
            state = load_checkpoint(path, model=self.policy.model, optimizer=self.policy.optimizer)
            self.policy.version = state["version"]
            self.scores = state["scores"]
            if self.leads:
                print(f"resuming from {path} at step {state['step']}", flush=True)
        if self.leads:
            self.tracker = Tracker(
                self.folder,
                config=config.logging,
                run_name=config.run.name,
                resolved=config.model_dump(mode="json"),
                state=state.get("tracker"),
            )
        return state

    def log(self, report: StepReport, groups: Sequence[ScoredGroup]) -> None:
        self.tracker.log(report.step, report.metrics)
        shown = groups[: self.config.logging.rollouts_per_step]
        if self.leads and shown:
            self.tracker.rollouts(report.step, _records(shown))

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        more = {**state, "scores": self.scores, "tracker": self.tracker.state_dict()}
        _save(self.store, self.policy, step, Path(self.config.model.path), self.config, more)

    def release(self) -> None:
        """The final weights as a Hugging Face folder at <run.dir>/hf."""
        write_release(
            self.stream,
            self.folder / "hf",
            companions=Path(self.config.model.path),
            facts=_facts(self.config) | {k: f"{v:.4f}" for k, v in self.scores.items()},
            writer=self.leads,
            dtype=_dtype(self.config),
            rope=self.shape.rope if self.config.model.rope_scaling else None,
        )


def _save(
    store: CheckpointStore,
    policy: Policy,
    step: int,
    model_folder: Path,
    config: Config,
    state: Mapping[str, Any],
) -> None:
    store.save(
        step,
        model=policy.model,
        optimizer=policy.optimizer,
        state={
            **state,
            "step": step,
            "version": policy.version,
            "dtype": _dtype(config),
            "facts": _facts(config) | {"optimizer updates": policy.version},
        },
        companions=partial(copy_companions, model_folder),
    )


def _shape(config: Config) -> ModelShape:
    shape = read_shape(config.model.path)
    if config.model.rope_scaling is None:
        return shape
    return replace(shape, rope={**shape.rope, **config.model.rope_scaling})


def _policy(config: Config, shape: ModelShape, *, temperature: float) -> Policy:
    layout = config.policy
    context: ParallelContext = init_parallel(
        tp=layout.tp, pp=layout.pp, cp=layout.cp, seed=config.run.seed
    )
    folder = Path(config.model.path)
    return Policy(
        shape,
        policy=layout,
        optimizer=config.optimizer,
        dtype=getattr(torch, _dtype(config)),
        temperature=temperature,
        context=context,
        shard=partial(
            shard_row,
            cp_size=layout.cp,
            cp_rank=context.cp.rank,
            multiple_of=layout.tp if layout.sequence_parallel else 1,
        ),
        load=lambda model: load_hf(folder, model, shape=shape, context=context),
    )


def _dtype(config: Config) -> str:
    """bfloat16 kernels are slow and rare on CPUs: without a GPU everything is float32."""
    return config.model.dtype if has_gpu() else "float32"


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: the tokenizer cannot be loaded: {error}") from error


def _stop_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """The tokenizer's end token and all of generation_config.json's."""
    stops = {tokenizer.eos_token_id}
    generation = folder / "generation_config.json"
    if generation.is_file():
        more = json.loads(generation.read_text()).get("eos_token_id") or []
        stops |= {more} if isinstance(more, int) else set(more)
    return sorted(s for s in stops if s is not None)


def _samplers(config: Config, prompts: Sequence[Prompt]) -> list[PhaseSampler]:
    limits = [0, *(p.max_input_tokens for p in config.phases)]
    return [
        PhaseSampler(
            prompts, phase=k, min_tokens=limits[k], max_tokens=limits[k + 1], seed=config.run.seed
        )
        for k in range(len(config.phases))
    ]


def _phases(config: Config, samplers: Sequence[PhaseSampler]) -> list[Phase]:
    phases, first = [], 0
    for index, (phase, sampler) in enumerate(zip(config.phases, samplers, strict=True)):
        end = first + phase.steps
        phases.append(
            Phase(index, phase.name, first, end, sampler.draw, sampler.observe, sampler.metrics)
        )
        first = end
    return phases


def _policy_loss(config: Config) -> PolicyLoss:
    a = config.algorithm
    return PolicyLoss(a.clip_low, a.clip_high, a.dual_clip, a.kl_coef, a.kl_kind, a.entropy_coef)


def _row_flops(shape: ModelShape, prompt: int, responses: Sequence[int]) -> float:
    """Forward FLOPs of one prompt block: linear layers on every token, causal attention of the
    prompt and of each response, responses on the prompt, LM head on responses only."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    linear = 2 * (shape.hidden_size * (2 * q + 2 * kv) + 3 * shape.hidden_size * shape.ffn_size)
    total = sum(responses)
    pairs = prompt**2 / 2 + sum(r * r / 2 + r * prompt for r in responses)
    return (
        shape.num_layers * (linear * (prompt + total) + 4 * q * pairs)
        + 2 * shape.hidden_size * shape.vocab_size * total
    )


def _facts(config: Config) -> dict[str, Any]:
    return {
        "base model": Path(config.model.path).name,
        "software": f"megatron_qlrl {__version__}",
        "phases": ", ".join(f"{p.name} (<= {p.max_input_tokens})" for p in config.phases) or "none",
        "seed": config.run.seed,
    }


def _records(groups: Sequence[ScoredGroup]) -> list[dict[str, Any]]:
    """Rollouts as they go into the log, one record per response."""
    return [
        {
            "uid": group.prompt.uid,
            "data_source": group.prompt.data_source,
            "sample": rollout.sample,
            "question": group.prompt.question,
            "ground_truth": group.prompt.ground_truth,
            "response": rollout.text,
            "num_tokens": len(rollout.token_ids),
            "finished": rollout.finished,
            "weight_version": rollout.weight_version,
            "score": score.value,
            "matched": score.matched,
            "prediction": score.prediction,
        }
        for group in groups
        for rollout, score in zip(group.rollouts, group.scores, strict=True)
    ]
