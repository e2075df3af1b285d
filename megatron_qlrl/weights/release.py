"""The Hugging Face folder that is released: weights, config, tokenizer, model card."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.parallel.collectives import on_all_ranks
from megatron_qlrl.weights.stream import WeightStream, write_hf

# What a model folder holds beside its weights.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_companions(
    source: Path, target: Path, *, dtype: str, rope: Mapping[str, Any] | None = None
) -> None:
    """Copies config and tokenizer files, those of `COMPANIONS` that `source` has.

    config.json gets the weights' `dtype`, and `rope` where the run changed the parameters.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    _write_config(target / "config.json", dtype=dtype, rope=rope)


def write_release(
    stream: WeightStream,
    out: Path,
    *,
    companions: Path,
    facts: Mapping[str, Any],
    writer: bool,
    dtype: str,
    rope: Mapping[str, Any] | None = None,
    shard_bytes: int = 4 * 2**30,
) -> None:
    """Streams the model into `out`; every rank iterates, the `writer` writes.

    Args:
        companions: folder with config.json and the tokenizer.
        facts: what the model card says of the training (plain values).
        dtype: written into config.json, as the weights are in it.
        rope: RoPE parameters that the run trained with, when they differ from the model's.

    Raises:
        CheckpointError: the folder cannot be written (every rank).
    """

    def prepare() -> None:
        if not writer:
            return
        try:
            copy_companions(companions, out, dtype=dtype, rope=rope)
            (out / "README.md").write_text(str(_card(facts)))
        except OSError as error:
            raise CheckpointError(f"cannot write the model folder {out}: {error}") from error

    on_all_ranks(prepare)
    on_all_ranks(lambda: write_hf(stream, out, shard_bytes=shard_bytes, writer=writer))


def _write_config(path: Path, *, dtype: str, rope: Mapping[str, Any] | None) -> None:
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)  # transformers 4's name of the same field
    config["dtype"] = dtype
    if rope is not None:
        for old in ("rope_scaling", "rope_theta"):
            config.pop(old, None)
        config["rope_parameters"] = dict(rope)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _card(facts: Mapping[str, Any]) -> ModelCard:
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return ModelCard(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags: [long-context, reinforcement-learning, megatron_qlrl]\n---\n\n"
        "# Model trained with megatron_qlrl\n\n"
        "Long-context reasoning after the QwenLong-L1 method (arXiv 2505.17667): warm-up SFT, "
        "then RL in phases of growing input length.\n\n"
        f"| training | |\n|---|---|\n{rows}\n"
    )
