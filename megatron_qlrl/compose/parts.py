"""The stages as one config describes them: model, samplers, phases, tokenizer, facts."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_qlrl import __version__
from megatron_qlrl.advantage.group import group_advantages
from megatron_qlrl.advantage.shaping import shaped_rewards
from megatron_qlrl.config.folder import end_tokens
from megatron_qlrl.config.schema import Config, CurriculumConfig
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.errors import CheckpointError, ConfigError, RewardError
from megatron_qlrl.loop import Advantages
from megatron_qlrl.packing.shard import shard_row
from megatron_qlrl.parallel.collectives import on_all_ranks
from megatron_qlrl.parallel.context import ParallelContext, init_parallel
from megatron_qlrl.platform.device import has_gpu
from megatron_qlrl.platform.env import PICKLED_STATE, may_unpickle_state, read_secret
from megatron_qlrl.policy.loss import PolicyLoss
from megatron_qlrl.policy.policy import Policy
from megatron_qlrl.reward.judge import Judge
from megatron_qlrl.reward.score import Scorer
from megatron_qlrl.types import Prompt, ScoredGroup
from megatron_qlrl.weights.checkpoint import CheckpointStore
from megatron_qlrl.weights.checkpoint_folder import read_state, taking_up
from megatron_qlrl.weights.release import base_name, copy_companions
from megatron_qlrl.weights.stream import load_hf


def weight_dtype(config: Config) -> str:
    """bfloat16 kernels are slow and rare on CPUs: without a GPU everything is float32."""
    return config.model.dtype if has_gpu() else "float32"


def make_context(config: Config) -> ParallelContext:
    layout = config.policy
    return init_parallel(tp=layout.tp, pp=layout.pp, cp=layout.cp, seed=config.run.seed)


def make_policy(
    config: Config,
    shape: ModelShape,
    context: ParallelContext,
    *,
    temperature: float,
    weights: Path,
) -> Policy:
    """A policy with the weights of a Hugging Face folder."""
    return Policy(
        shape,
        config=config.policy,
        optimizer_config=config.optimizer,
        dtype=getattr(torch, weight_dtype(config)),
        temperature=temperature,
        context=context,
        shard=partial(
            shard_row,
            cp_size=context.cp.size,
            cp_rank=context.cp.rank,
            multiple_of=config.policy.tokens_multiple,
        ),
        load=lambda model: load_hf(weights, model, shape=shape, context=context),
    )


def make_store(config: Config) -> CheckpointStore:
    """The run's checkpoints; needs the process group."""
    return CheckpointStore(
        Path(config.run.dir) / "checkpoints",
        keep=config.checkpoint.keep,
        warn=print if dist.get_rank() == 0 else lambda _: None,
    )


def check_resumable(config: Config) -> None:
    """Whether the checkpoints that a run writes may be read again.

    Raises:
        ConfigError: delayed FP8 scaling, without the user's leave to unpickle its state.
    """
    policy = config.policy
    if policy.fp8 != "off" and policy.fp8_recipe == "delayed" and not may_unpickle_state():
        raise ConfigError(
            "policy.fp8_recipe=delayed keeps a pickle in each checkpoint, which could run any code "
            f"where it is read, so that the run could not resume. Set {PICKLED_STATE}=1 in the "
            "environment if run.dir holds checkpoints of your own alone, or set another "
            "policy.fp8_recipe (blockwise or tensorwise)"
        )


def newest_checkpoint(config: Config, command: str) -> Path | None:
    """What a run of `qlrl <command>` continues from; None for a fresh start (collective).

    Raises:
        CheckpointError: another command left it in run.dir.
    """
    newest = make_store(config).newest() if config.checkpoint.resume else None

    def check() -> None:
        if newest is None:
            return
        with taking_up(newest):
            other = read_state(newest)["command"]
        if other != command:
            raise CheckpointError(
                f"run.dir {config.run.dir} holds a run of `qlrl {other}`, which `qlrl {command}` "
                "cannot go on with; set run.dir to another folder, and model.path to the Hugging "
                "Face folder to start from"
            )

    on_all_ranks(check)
    return newest


def save_checkpoint(
    store: CheckpointStore,
    policy: Policy,
    step: int,
    model_folder: Path,
    config: Config,
    state: Mapping[str, Any],
) -> None:
    shape = policy.model_shape
    store.save(
        step,
        model=policy.model,
        optimizer=policy.optimizer,
        state={
            **state,
            "step": step,
            "version": policy.version,
            "dtype": weight_dtype(config),
            "facts": run_facts(config)
            | {"optimizer updates": policy.version}
            | state.get("facts", {}),
        },
        companions=partial(
            copy_companions,
            model_folder,
            dtype=weight_dtype(config),
            positions=shape.position_fields(),
        ),
    )


def load_tokenizer(folder: Path) -> Any:
    """Raises ConfigError where its files cannot be used."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # transformers checks nothing: damaged files end in any error of Python, and tokenizers raises
    # Exception itself.
    except Exception as error:
        raise ConfigError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}); copy "
            "the tokenizer files of the model again"
        ) from error


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Whether the model knows every token of its tokenizer. A padding token may lie beyond: no
    text holds one.

    Raises:
        ConfigError: naming tokens that it does not know.
    """
    beyond = [
        f"{token!r} ({number})"
        for token, number in tokenizer.get_vocab().items()
        if number >= vocab_size and number != tokenizer.pad_token_id
    ]
    if beyond:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has {len(beyond)} tokens that the model "
            f"with its vocab_size={vocab_size} does not know, e.g. {', '.join(beyond[:3])}; put "
            "the model's own tokenizer files into model.path"
        )


def stop_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """The tokenizer's end token and all of generation_config.json's."""
    stops = {tokenizer.eos_token_id, *end_tokens(folder)}
    return sorted(s for s in stops if s is not None)


def make_curriculum(
    whole: Config, settings: CurriculumConfig, prompts: Sequence[Prompt]
) -> Curriculum:
    """The curriculum of all phases of the run, with the settings of those that run now."""
    return Curriculum(
        prompts,
        limits=[p.max_input_tokens for p in whole.phases],
        seed=whole.run.seed,
        config=settings,
    )


def make_advantages(config: Config) -> Advantages:
    """Advantages of a group's rewards, shaped by length where the config asks for it."""
    buffer = config.algorithm.overlong_buffer_tokens

    def advantages(group: ScoredGroup) -> np.ndarray:
        rewards = group.rewards
        if buffer is not None:
            lengths = np.array([len(r.token_ids) for r in group.rollouts])
            longest = config.rollout.max_response_tokens
            rewards = shaped_rewards(rewards, lengths, max_tokens=longest, buffer_tokens=buffer)
        return group_advantages(rewards, config.algorithm.advantage)

    return advantages


def policy_loss(config: Config) -> PolicyLoss:
    return PolicyLoss(config.algorithm)


def make_scorer(config: Config) -> Scorer:
    judge = config.reward.judge
    return Scorer(judge and Judge(judge, key=read_secret(judge.api_key_env)))


def check_masked(groups: Sequence[ScoredGroup], *, max_share: float, reason: str) -> None:
    """Stops a batch whose rewards are no longer those of the task.

    Raises:
        RewardError: more than `max_share` of the responses have no verdict; `reason` says why.
    """
    values = [s.value for g in groups for s in g.scores]
    masked = values.count(None)
    if masked > max_share * len(values):
        raise RewardError(
            f"the judge gave no verdict on {masked} of {len(values)} responses, more than "
            f"reward.max_masked_share={max_share:g} ({reason}). Bring the judge back and start "
            "again: the run resumes"
        )


def judge_metrics(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The judges' counts of all ranks as metrics."""
    total = {name: sum(c[name] for c in counts) for name in counts[0]}
    latency = total.pop("latency_s") / max(total.pop("replies"), 1)
    found = {f"reward/judge/{name}": value for name, value in total.items()}
    return found | {"reward/judge/latency_s": latency}


def run_facts(config: Config) -> dict[str, Any]:
    return {
        "base model": config.model.name or base_name(Path(config.model.path)),
        "software": f"megatron_qlrl {__version__}",
        "phases": ", ".join(f"{p.name} (<= {p.max_input_tokens})" for p in config.phases) or "none",
        "seed": config.run.seed,
    }


def rollout_records(groups: Sequence[ScoredGroup]) -> list[dict[str, Any]]:
    """Rollouts as they go into the log, one record per response."""
    return [
        {
            "uid": group.prompt.uid,
            "data_source": group.prompt.data_source,
            "sample": rollout.sample,
            "question": group.prompt.question,
            "ground_truth": group.prompt.ground_truth,
            "response": rollout.text,
            "reasoning": "required" if group.prompt.reasoning_open else "optional",
            "num_tokens": len(rollout.token_ids),
            "finished": rollout.finished,
            "weight_version": rollout.weight_version,
            "score": score.value,
            "rule": score.rule,
            "judge": score.judge,
            "matched": score.matched,
            "prediction": score.prediction,
        }
        for group in groups
        for rollout, score in zip(group.rollouts, group.scores, strict=True)
    ]
