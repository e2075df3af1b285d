"""Checks of a config against the model folder, the data files and the machine (torch-free).

They run in the launcher, before any process is started or any weight is read, so that a
mistake costs a second.
"""

import tempfile
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from math import gcd, lcm
from pathlib import Path
from typing import Literal

from megatron_qlrl.config.folder import check_folder
from megatron_qlrl.config.run_folder import check_parent
from megatron_qlrl.config.schema import FILE_NAME, Config, PolicyConfig
from megatron_qlrl.config.shape import ModelShape, read_json, read_shape
from megatron_qlrl.errors import ConfigError

Command = Literal["sft", "rl", "eval", "distill"]


def check_layout(config: Config, shape: ModelShape, *, world_size: int) -> None:
    """Checks that the model can be split and run as configured on `world_size` processes.

    Raises:
        ConfigError: a size does not fit; names valid values.
    """
    check_split(shape, tp=config.policy.tp, pp=config.policy.pp)
    engine_sizes = _tp_sizes(shape)
    if shape.experts:  # the engine cuts experts, the trainer does not
        engine_sizes["moe_intermediate_size"] = shape.experts.ffn_size
    _must_divide("rollout.tp", config.rollout.tp, engine_sizes)
    policy = config.policy
    need = policy.tp * policy.pp * policy.cp
    if world_size % need:
        raise ConfigError(
            f"{world_size} processes cannot hold policy.tp={policy.tp} x pp={policy.pp} x "
            f"cp={policy.cp}; start a multiple of {need} (--processes, or nodes x GPUs) or "
            "change the sizes"
        )
    if world_size % config.rollout.tp:
        raise ConfigError(
            f"rollout.tp={config.rollout.tp} does not divide the {world_size} processes; valid "
            f"values: {_listed(_divisors(gcd(world_size, *engine_sizes.values())))}"
        )
    _check_experts(policy, shape, world_size=world_size)
    _check_length(config, shape)
    _check_fp8(config.policy, shape)


def check_split(shape: ModelShape, *, tp: int, pp: int) -> None:
    """Raises ConfigError unless tp divides heads, KV heads and FFN, and pp the layers."""
    _must_divide("policy.tp", tp, _tp_sizes(shape))
    _must_divide("policy.pp", pp, {"num_hidden_layers": shape.num_layers})


def _check_experts(policy: PolicyConfig, shape: ModelShape, *, world_size: int) -> None:
    """Checks that the ranks of a pipeline stage can divide the experts among themselves."""
    if shape.experts is None:
        if policy.ep > 1:
            raise ConfigError(
                f"policy.ep={policy.ep} divides experts, and this model has none; set policy.ep=1"
            )
        return
    stage = world_size // policy.pp
    _must_divide("policy.ep", policy.ep, {"num_experts": shape.experts.num})
    if stage % policy.ep:
        raise ConfigError(
            f"policy.ep={policy.ep} does not divide the {stage} ranks of a pipeline stage "
            f"({world_size} processes, policy.pp={policy.pp}); valid values: "
            f"{_listed(_divisors(gcd(stage, shape.experts.num)))}"
        )
    within = policy.tp * policy.cp
    if max(policy.ep, within) % min(policy.ep, within):
        raise ConfigError(
            f"policy.ep={policy.ep} and policy.tp={policy.tp} x cp={policy.cp} must divide one "
            "another, so that experts are divided among the ranks of a row or among whole rows; "
            f"valid values: {_listed(_expert_sizes(stage, within, shape.experts.num))}"
        )
    if policy.tp > 1 and not policy.sequence_parallel:
        raise ConfigError(
            "policy.sequence_parallel=false with policy.tp > 1 would send each token to its "
            "experts once for every tensor parallel rank; set policy.sequence_parallel=true or "
            "policy.tp=1"
        )
    if policy.fp8 != "off":
        raise ConfigError(
            f"policy.fp8={policy.fp8} is not supported for a model with experts: each expert gets "
            "another number of tokens, and no padding to FP8 blocks is tested; set policy.fp8=off"
        )


def _expert_sizes(stage: int, within: int, experts: int) -> list[int]:
    sizes = _divisors(gcd(stage, experts))
    return [size for size in sizes if max(size, within) % min(size, within) == 0]


def _check_fp8(policy: PolicyConfig, shape: ModelShape) -> None:
    """Checks that tensor parallel shards of all linear layers are whole FP8 blocks."""
    block, tp = policy.fp8_block, policy.tp
    sizes = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size // tp,
        "query heads x head_dim": shape.num_heads * shape.head_dim // tp,
        "key/value heads x head_dim": shape.num_kv_heads * shape.head_dim // tp,
    }
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % block]
    if wrong:
        raise ConfigError(
            f"policy.fp8={policy.fp8} with fp8_recipe={policy.fp8_recipe} needs multiples of "
            f"{block} on each of policy.tp={tp} ranks, but this model has {', '.join(wrong)} "
            "there; use a smaller tp, fp8_recipe=tensorwise (multiples of 16), or fp8=off"
        )


def check_files(config: Config, command: Command) -> None:
    """Checks that the files, the phases and the parent run that `command` works on are named and
    exist.

    Raises:
        ConfigError: naming the setting, and every missing file.
    """
    data = config.data
    required = {"sft": "sft_files", "eval": "eval_files"}.get(command, "train_files")
    if not getattr(data, required):
        raise ConfigError(
            f"`qlrl {command}` needs data.{required}; name at least one parquet file "
            f"(data.{required}=[path/to/file.parquet])"
        )
    if command == "rl" and not config.phases:
        raise ConfigError(
            "`qlrl rl` needs at least one entry under phases (name, max_input_tokens, steps)"
        )
    if command == "distill" and config.distill.teacher is None:
        raise ConfigError(
            "`qlrl distill` needs a teacher: distill.teacher.urls=[http://host:8000/v1] and "
            "distill.teacher.model=NAME"
        )
    missing = [
        f"data.{name}: {file}"
        for name in dict.fromkeys((required, "eval_files"))
        for file in getattr(data, name)
        if not Path(file).is_file()
    ]
    if missing:
        raise ConfigError(
            f"data files do not exist (relative paths start at {Path.cwd()}): {'; '.join(missing)}"
        )
    if command == "rl":
        check_parent(config)
    stems = [Path(file).stem for file in data.eval_files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ConfigError(
            f"data.eval_files: benchmarks are named by file name, and {', '.join(twice)} appears "
            "twice; rename one file"
        )
    wrong = [repr(stem) for stem in stems if not FILE_NAME.fullmatch(stem)]
    if wrong:
        raise ConfigError(
            f"data.eval_files: benchmarks are named by file name, and {', '.join(wrong)} is no "
            "name of letters, digits, '.', '_' and '-' (at most 100); rename the file"
        )


def check_machine(config: Config, *, processes: int, num_gpus: int) -> None:
    """Checks that this machine can run `processes` ranks of the configuration.

    Raises:
        ConfigError: more ranks than GPUs, FP8 without a GPU or Transformer Engine, or float32 on
            a GPU.
    """
    if num_gpus and processes > num_gpus:
        raise ConfigError(
            f"--processes {processes} on a machine with {num_gpus} usable GPU(s); each process "
            "needs its own: lower it, or start on more nodes with srun or torchrun"
        )
    if not num_gpus and config.policy.fp8 != "off":
        raise ConfigError(
            f"policy.fp8={config.policy.fp8} needs a GPU and this machine has none; set "
            "policy.fp8=off"
        )
    if num_gpus and config.policy.fp8 != "off" and find_spec("transformer_engine") is None:
        raise ConfigError(
            f"policy.fp8={config.policy.fp8} needs Transformer Engine, which is not installed; "
            'pip install "transformer-engine[pytorch]", or set policy.fp8=off'
        )
    if num_gpus and config.model.dtype == "float32":
        raise ConfigError(
            "model.dtype=float32 on a GPU: the attention kernels there take bfloat16 only; set "
            "model.dtype=bfloat16"
        )


def check_run_dir(config: Config) -> None:
    """Checks that run.dir, or the folder above it, takes a file.

    Raises:
        ConfigError: it does not.
    """
    folder = Path(config.run.dir)
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        raise ConfigError(
            f"run.dir {folder} cannot be written ({place}: {error.strerror}); free space there or "
            "set run.dir to a folder that can be written"
        ) from error


def checkpoint_bytes(model_path: str | Path) -> int:
    """Returns about the size of a checkpoint, from the weight files: 16 bytes a parameter (float32
    weights and Adam's two moments, and the weights as they are trained)."""
    folder = Path(model_path)
    check_folder(folder, read_shape(folder, rope_scaling=None))
    hf = read_json(folder / "config.json")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return size // (4 if hf.get("dtype", hf.get("torch_dtype")) == "float32" else 2) * 16


def smallest_world_size(configs: Iterable[Config]) -> int:
    """Returns the fewest processes that hold the training and rollout layouts of all configs."""
    sizes: list[int] = []
    for config in configs:
        policy = config.policy
        sizes += [policy.tp * policy.pp * policy.cp, policy.pp * policy.ep, config.rollout.tp]
    return lcm(*sizes)


def _check_length(config: Config, shape: ModelShape) -> None:
    if not config.phases:
        return
    need = config.max_input_tokens + config.rollout.max_response_tokens
    limit = shape.max_positions
    if need > limit:
        original = shape.rope.get("original_max_position_embeddings", shape.max_position_embeddings)
        raise ConfigError(
            f"the longest prompt plus response, {config.max_input_tokens} + "
            f"{config.rollout.max_response_tokens} tokens, is beyond the model's {limit} "
            "positions; shorten phases or rollout.max_response_tokens, or set model.rope_scaling "
            f"(for example {{rope_type: yarn, factor: {-(-need // original)}.0, "
            f"original_max_position_embeddings: {original}}})"
        )


def _tp_sizes(shape: ModelShape) -> dict[str, int]:
    sizes = {"num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads}
    return sizes if shape.experts else sizes | {"intermediate_size": shape.ffn_size}


def _must_divide(setting: str, value: int, sizes: Mapping[str, int]) -> None:
    bad = [f"{name}={size}" for name, size in sizes.items() if size % value]
    if bad:
        raise ConfigError(
            f"{setting}={value} does not divide the model's {', '.join(bad)}; valid values: "
            f"{_listed(_divisors(gcd(*sizes.values())))}"
        )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _listed(values: list[int]) -> str:
    return ", ".join(str(v) for v in values)
