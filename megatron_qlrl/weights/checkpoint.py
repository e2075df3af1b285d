"""Checkpoints: Megatron's dist_checkpointing (torch_dist), written aside, hashed, renamed.

    <run.dir>/checkpoints/step_00000012/
        weights/        model and optimizer; loads under another tp, pp, cp or dp
        hf/             config and tokenizer, so that a checkpoint can be exported by itself
        state.json      everything else the run needs to go on: step, phase, data order,
                        curriculum, tracker
        manifest.json   sha256 of every other file; a folder whose files do not match is torn

The folder gets its name only when all of it is on disk, so a kill leaves either a good
checkpoint or a `.tmp` folder. Saving forks writer processes: the program's entry must be
import-safe.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.parallel.collectives import gather_objects, on_all_ranks
from megatron_qlrl.platform.megatron_cpu import megatron_device

# The optimizer state is laid out by model parameter, so that any layout can read it.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int, warn: Callable[[str], None]) -> None:
        """`warn` is told of checkpoints that were passed over."""
        self.folder, self._keep, self._warn = folder, keep, warn

    def save(
        self,
        step: int,
        *,
        model: Any,
        optimizer: Any,
        state: Mapping[str, Any],
        companions: Callable[[Path], None] = lambda folder: None,
    ) -> Path:
        """Writes a checkpoint and removes the oldest ones beyond `keep`; collective.

        `companions` fills the checkpoint's hf/ folder (called on rank 0).

        Raises:
            CheckpointError: it could not be written (every rank); earlier ones are untouched.
        """
        final = self.folder / f"step_{step:08d}"
        temporary = self.folder / f"{final.name}.tmp"
        weights = temporary / "weights"
        on_all_ranks(lambda: self._prepare(weights, _local_bytes(model)))
        with megatron_device():
            sharded = _sharded_state(model, optimizer, is_loading=False)
            on_all_ranks(lambda: _write(sharded, weights))
        if dist.get_rank() == 0:
            companions(temporary / "hf")
        on_all_ranks(lambda: _finish(temporary, final, state))
        on_all_ranks(self._remove_old)
        return final

    def newest(self) -> Path | None:
        """The newest checkpoint whose files all match its manifest, the same on every rank."""
        found = on_all_ranks(self._newest if dist.get_rank() == 0 else lambda: None)
        return gather_objects(found)[0]

    def _newest(self) -> Path | None:
        for folder in sorted(self.folder.glob("step_????????"), reverse=True):
            problem = torn(folder)
            if problem is None:
                return folder
            self._warn(f"checkpoint {folder} is passed over: {problem}")
        return None

    def _prepare(self, weights: Path, num_bytes: int) -> None:
        needed = sum(gather_objects(num_bytes))
        if dist.get_rank():
            return
        try:
            shutil.rmtree(weights.parent, ignore_errors=True)
            weights.mkdir(parents=True)
            free = shutil.disk_usage(weights).free
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoints to {self.folder}: {error}") from error
        if free < needed:
            raise CheckpointError(
                f"disk full: a checkpoint needs about {needed / 1e9:.2f} GB and {self.folder} has "
                f"{free / 1e9:.2f} GB free; the last good checkpoint is untouched. Free space or "
                "set run.dir elsewhere, then start again: the run resumes"
            )

    def _remove_old(self) -> None:
        if dist.get_rank() == 0:
            for folder in sorted(self.folder.glob("step_????????"))[: -self._keep]:
                shutil.rmtree(folder)


def load_checkpoint(path: Path, *, model: Any, optimizer: Any) -> dict[str, Any]:
    """Fills model and optimizer in place and returns the saved state.

    Raises:
        CheckpointError: the checkpoint does not fit the model (every rank).
    """
    with megatron_device():
        sharded = _sharded_state(model, optimizer, is_loading=True)
        loaded = on_all_ranks(lambda: _read(sharded, path))
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
    return json.loads((path / "state.json").read_text())


def load_weights(path: Path, *, model: Any) -> None:
    """Fills the model alone, for export and evaluation."""
    with megatron_device():
        sharded = {"model": model.sharded_state_dict(metadata=_METADATA)}
        model.load_state_dict(on_all_ranks(lambda: _read(sharded, path))["model"])


def torn(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, None when it is whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return "it has no readable manifest.json (an interrupted save)"
    for name, digest in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} does not match its checksum"
    return None


def _sharded_state(model: Any, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    weights = model.sharded_state_dict(metadata=_METADATA)
    moments = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_METADATA)
    return {"model": weights, "optimizer": moments}


def _write(sharded: dict[str, Any], weights: Path) -> None:
    try:
        dist_checkpointing.save(sharded, str(weights))
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(
            f"the checkpoint could not be written to {weights} ({_first_line(error)}); the last "
            "good checkpoint is untouched"
        ) from error


def _read(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(sharded, str(path / "weights"))
    except (OSError, RuntimeError, KeyError, CheckpointException) as error:
        raise CheckpointError(f"{path} does not fit this model: {_first_line(error)}") from error


def _finish(temporary: Path, final: Path, state: Mapping[str, Any]) -> None:
    """Hashes (files shared out over the ranks), manifest, sync, rename."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        (temporary / "state.json").write_text(json.dumps(state))
    dist.barrier()
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    mine = {str(p.relative_to(temporary)): _digest(p) for p in files[rank::world_size]}
    digests = {name: digest for part in gather_objects(mine) for name, digest in part.items()}
    if rank == 0:
        (temporary / "manifest.json").write_text(json.dumps(digests, indent=1))
        for path in [*files, temporary / "manifest.json", temporary]:
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _local_bytes(model: torch.nn.Module) -> int:
    """This rank's share of a checkpoint, at least: weights and two float32 Adam moments."""
    return sum(p.numel() * (p.element_size() + 8) for p in model.parameters())


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
