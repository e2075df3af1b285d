"""A model folder against the checkpoint that it came from, byte for byte."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_qlrl.config.folder import COMPANIONS, find_tensors
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.errors import ReleaseError


def compare_companions(folder: Path, checkpoint: Path) -> str:
    """Compares config, tokenizer and chat template with those in the checkpoint.

    Raises:
        ReleaseError: a file differs, or is in one of the two alone.
    """
    kept = checkpoint / "hf"
    same = 0
    for name in COMPANIONS:
        ours, theirs = folder / name, kept / name
        if ours.is_file() != theirs.is_file():
            here, there = (ours, kept) if ours.is_file() else (theirs, folder)
            raise ReleaseError(f"{here} is not in {there}; {_mend(checkpoint)}")
        if ours.is_file():
            if ours.read_bytes() != theirs.read_bytes():
                raise ReleaseError(f"{ours} differs from {theirs}; {_mend(checkpoint)}")
            same += 1
    return f"{same} files equal those of {checkpoint.name}, byte for byte"


def compare_weights(
    folder: Path,
    exported: Iterable[tuple[str, torch.Tensor]],
    *,
    shape: ModelShape,
    checkpoint: Path,
) -> str:
    """Compares the weights with those that the checkpoint exports now.

    Args:
        exported: names and tensors of the export.
        shape: of the checkpoint's model.

    Raises:
        ReleaseError: a tensor differs in its type, its size or a bit.
        CheckpointError: the folder's tensors are not those of `shape`.
    """
    where = find_tensors(folder, shape)
    num = 0
    for name, tensor in exported:
        opened = safe_open(where[name], framework="pt")
        with opened as file:  # pyright: ignore[reportGeneralTypeIssues]
            held: torch.Tensor = file.get_tensor(name)
        num += 1
        if (held.dtype, held.shape) != (tensor.dtype, tensor.shape):
            raise ReleaseError(
                f"{where[name]}: tensor {name} is {held.dtype} {tuple(held.shape)}, in the "
                f"checkpoint {tensor.dtype} {tuple(tensor.shape)}; {_mend(checkpoint)}"
            )
        raw = [t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (held, tensor)]
        if not torch.equal(*raw):
            numbers = (raw[0] != raw[1]).view(-1, held.element_size()).any(1).sum()
            raise ReleaseError(
                f"{where[name]}: tensor {name} differs from the checkpoint's in {numbers:,} of "
                f"{held.numel():,} numbers; {_mend(checkpoint)}"
            )
    return f"{num} tensors equal those that {checkpoint.name} exports, byte for byte"


def _mend(checkpoint: Path) -> str:
    return f"export {checkpoint} again, or name the checkpoint of this folder with --checkpoint"
