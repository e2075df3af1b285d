"""Writes the Hugging Face folder of a release: weights, config, tokenizer, model card."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from megatron_qlrl.config.schema import MODEL_NAME
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


def base_name(folder: Path) -> str:
    """Returns the name of the model in `folder`, never a path. A release of this package has its
    base's name, a folder of Hugging Face's cache its repository's, any other folder its own. Every
    release's folder is called "hf", so "hf" is not a name."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    ours = "\n- megatron_qlrl\n" in text  # its tag
    if ours and (base := re.search(rf"^base_model: ({MODEL_NAME})$", text, re.MULTILINE)):
        return base[1]
    places = [part for part in folder.absolute().parts if part.startswith("models--")]
    name = "/".join(places[-1].split("--")[1:]) if places else folder.absolute().name
    named = re.fullmatch(MODEL_NAME, name) is not None and name != "hf"
    return name if named else "not named (set model.name)"


def copy_companions(
    source: Path, target: Path, *, dtype: str, positions: Mapping[str, Any]
) -> None:
    """Copies config and tokenizer files, those of `COMPANIONS` that `source` has.

    config.json gets the weights' `dtype` and the run's `positions` (`ModelShape.position_fields`).
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    _write_config(target / "config.json", dtype=dtype, positions=positions)


def write_release(
    stream: WeightStream,
    out: Path,
    *,
    companions: Path,
    facts: Mapping[str, Any],
    writer: bool,
    dtype: str,
    positions: Mapping[str, Any],
    shard_bytes: int = 4 * 2**30,
) -> None:
    """Streams the model into `out`; every rank iterates, the `writer` writes.

    Args:
        companions: folder with config.json and the tokenizer.
        facts: what the model card says of the training (plain values).
        dtype: written into config.json, as the weights are in it.
        positions: likewise, how many there are and how RoPE is scaled.

    Raises:
        CheckpointError: the folder cannot be written (every rank).
    """

    def prepare() -> None:
        if not writer:
            return
        try:
            copy_companions(companions, out, dtype=dtype, positions=positions)
            (out / "README.md").write_text(str(_card(facts)))
        except OSError as error:
            raise CheckpointError(f"cannot write the model folder {out}: {error}") from error

    on_all_ranks(prepare)
    on_all_ranks(lambda: write_hf(stream, out, shard_bytes=shard_bytes, writer=writer))


def _write_config(path: Path, *, dtype: str, positions: Mapping[str, Any]) -> None:
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)  # transformers 4's name of the same field
    rope = positions["rope_parameters"]
    # transformers 4 reads these two instead, and silently takes defaults where they are missing.
    older = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else dict(rope),
    }
    config |= {"dtype": dtype, **positions, **older}
    path.write_text(json.dumps(config, indent=2) + "\n")


def _card(facts: Mapping[str, Any]) -> ModelCard:
    base = str(facts.get("base model", ""))
    named = f"base_model: {base}\n" if re.fullmatch(MODEL_NAME, base) else ""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return ModelCard(
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{named}"
        "tags: [long-context, reinforcement-learning, megatron_qlrl]\n---\n\n"
        "# Model trained with megatron_qlrl\n\n"
        "Long-context reasoning after the QwenLong-L1 method (arXiv 2505.17667): warm-up SFT, "
        "then RL in phases of growing input length.\n\n"
        f"| training | |\n|---|---|\n{rows}\n"
    )
