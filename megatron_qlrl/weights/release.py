"""Writes the Hugging Face folder of a release: weights, config, tokenizer, model card."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_qlrl.config.folder import COMPANIONS
from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.parallel.collectives import on_all_ranks
from megatron_qlrl.weights.stream import WeightStream, write_hf


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
    card: Callable[[Path], str],
    writer: bool,
    dtype: str,
    positions: Mapping[str, Any],
    shard_bytes: int = 4 * 2**30,
) -> None:
    """Streams the model into `out`; every rank iterates, the `writer` writes.

    Args:
        companions: folder with config.json and the tokenizer.
        card: makes the model card of the folder, which has its config.json by then.
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
            (out / "README.md").write_text(card(out), encoding="utf-8")
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
