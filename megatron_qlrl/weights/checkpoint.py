"""Checkpoints: Megatron's sharded format (torch_dist), written aside, hashed, renamed.

    <run.dir>/checkpoints/step_00000012/
        weights/        model and optimizer; loads under another tp, pp, cp or dp
        hf/             config and tokenizer, so that a checkpoint can be exported by itself
        state.json      everything else the run needs to go on: step, phase, data order,
                        curriculum, tracker
        manifest.json   sha256 of every other file; a folder whose files do not match is torn

The folder gets its name only when all of it is on disk, so a kill leaves either a good
checkpoint or a `.tmp` folder, which the next good save removes.

Trust: `weights/common.pt` and the tensors are read with torch's `weights_only`, but
`weights/.metadata` is a pickle to torch's reader (and so is the extra state that Transformer
Engine's layers keep). The manifest proves a checkpoint whole, not harmless: load only
checkpoints of your own runs.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.parallel.collectives import gather_objects, on_all_ranks
from megatron_qlrl.platform.megatron_cpu import megatron_device

T = TypeVar("T")


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
        """Writes a checkpoint and removes all but the newest `keep`; collective.

        `companions` fills the checkpoint's hf/ folder (called on rank 0).

        Raises:
            CheckpointError: it could not be written (every rank); earlier ones are untouched.
        """
        final = self.folder / f"step_{step:08d}"
        temporary = self.folder / f"{final.name}.tmp"
        with megatron_device():
            _complete_adam_state(optimizer)
            tensors, common = save_preprocess(_sharded_state(model, optimizer, is_loading=False))
        needed = sum(gather_objects(_local_bytes(tensors)))
        try:
            _on_rank_0(self.folder, lambda: self._prepare(temporary, needed))
            _write(tensors, common, temporary / "weights")
            _on_rank_0(self.folder, lambda: companions(temporary / "hf"))
            _on_rank_0(self.folder, lambda: _write_json(temporary / "state.json", state))
            digests = _digests(temporary)
            _on_rank_0(self.folder, lambda: _publish(temporary, final, digests))
            _on_rank_0(self.folder, lambda: self._remove_others(step))
        except CheckpointError:
            if dist.get_rank() == 0:  # half a checkpoint only fills the disk
                shutil.rmtree(temporary, ignore_errors=True)
            raise
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

    def _prepare(self, temporary: Path, needed: int) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "weights").mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < needed:
            raise CheckpointError(
                f"disk full: a checkpoint needs about {needed / 1e9:.2f} GB and {self.folder} has "
                f"{free / 1e9:.2f} GB free; the last good checkpoint is untouched. Free space or "
                "set run.dir elsewhere, then start again: the run resumes"
            )

    def _remove_others(self, step: int) -> None:
        """All but the last `keep` up to `step`. What is numbered higher was torn when the run
        resumed below it; counted in, it would push good checkpoints out."""
        folders = sorted(self.folder.glob("step_????????"))
        kept = [f for f in folders if f.name <= f"step_{step:08d}"][-self._keep :]
        for folder in [*folders, *self.folder.glob("step_????????.tmp")]:
            if folder not in kept:
                shutil.rmtree(folder)


def load_checkpoint(path: Path, *, model: Any, optimizer: Any) -> dict[str, Any]:
    """Fills model and optimizer in place and returns the saved state.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or a rank cannot see it
            (every rank).
    """
    state = on_all_ranks(lambda: _read_state(path))
    with megatron_device():
        _complete_adam_state(optimizer)
        sharded = _sharded_state(model, optimizer, is_loading=True)
        loaded = on_all_ranks(lambda: _read(sharded, path))
        model.load_state_dict(loaded["model"])
        _load_optimizer(optimizer, loaded["optimizer"])
    return state


def step_of(path: Path) -> int:
    """Steps done at a checkpoint, by its name."""
    return int(path.name.removeprefix("step_"))


def load_weights(path: Path, *, model: Any) -> dict[str, Any]:
    """Fills the model alone, for export and for an optimizer that starts anew; the saved state."""
    state = on_all_ranks(lambda: _read_state(path))
    with megatron_device():
        sharded = {"model": model.sharded_state_dict(metadata=_metadata())}
        model.load_state_dict(on_all_ranks(lambda: _read(sharded, path))["model"])
    return state


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


def _metadata() -> dict[str, Any]:
    """How Megatron lays out the optimizer state: by model parameter, so that any layout can
    read it. A new dict each time: Megatron keeps its process group in the one it is given."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _sharded_state(model: Any, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    weights = model.sharded_state_dict(metadata=metadata)
    moments = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return {"model": weights, "optimizer": moments}


def _complete_adam_state(optimizer: Any) -> None:
    """Gives each parameter of torch's Adam both moments and a `step` of its own.

    Megatron 0.16 does not expect torch's Adam (used where Transformer Engine is missing) to
    have no state yet: its distributed optimizer reads `step` while it prepares to load, and
    neither optimizer keeps a state that no update has filled. And its distributed optimizer
    loads ONE step tensor into all parameters; torch adds 1 to it once for each of them.
    """
    part = _only_part(optimizer)
    if isinstance(part.optimizer, torch.optim.Adam):
        part.init_state_fn(part.optimizer, part.config)
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone() if "step" in state else torch.tensor(0.0)


def _load_optimizer(optimizer: Any, loaded: dict[str, Any]) -> None:
    """`load_state_dict`, with the distributed optimizer's moments apart: Megatron 0.16 looks in
    them for all that a parameter's state has, and torch's Adam has a `step`, kept elsewhere."""
    part = _only_part(optimizer)
    moments = loaded.pop("param_state", None)
    inner = loaded.get("optimizer", loaded)
    if isinstance(part.optimizer, torch.optim.Adam) and "state" in inner:
        inner["state"].setdefault("common_step", torch.tensor(0.0))  # Megatron saves no 0
    part.load_state_dict(loaded)
    if moments is not None:
        states = part.optimizer.state
        steps = {p: state.pop("step") for p, state in states.items() if "step" in state}
        part.load_parameter_state_from_fully_reshardable(moments)
        for parameter, step in steps.items():
            states[parameter]["step"] = step
    _complete_adam_state(optimizer)


def _only_part(optimizer: Any) -> Any:
    """Megatron chains one optimizer for each kind of parameter; a dense model has one kind."""
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return part


def _write(tensors: Any, common: Any, weights: Path) -> None:
    """What `dist_checkpointing.save` does, with two differences. Tensors are written by torch's
    saver in this process, not by Megatron's: that starts three processes for each rank. And no
    rank is left waiting: Megatron writes some files on rank 0 between collectives, where an
    error (a full disk) is rank 0's alone."""
    _on_rank_0(weights, lambda: torch.save(common, weights / "common.pt"))
    on_all_ranks(lambda: _write_tensors(tensors, weights))
    config = CheckpointingConfig("torch_dist", 1)
    _on_rank_0(weights, lambda: save_config(config, str(weights)))


def _write_tensors(tensors: Any, weights: Path) -> None:
    by_key, *_ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    try:
        save_tensors(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=FileSystemWriter(weights),
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )
    except CheckpointException as error:  # on every rank, whichever failed
        raise _cannot_write(weights, _first_failure(error)) from error


def _on_rank_0(where: Path, work: Callable[[], Any]) -> None:
    """Runs `work`, which writes under `where`, on rank 0; its failure is every rank's."""
    on_all_ranks(lambda: _guarded(where, work) if dist.get_rank() == 0 else None)


def _guarded(where: Path, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (OSError, RuntimeError) as error:  # torch's file writer raises RuntimeError
        raise _cannot_write(where, _first_line(error)) from error


def _cannot_write(where: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint could not be written to {where} ({reason}); the last good checkpoint "
        "is untouched. Mend the disk or set run.dir elsewhere, then start again: the run resumes"
    )


def _read_state(path: Path) -> dict[str, Any]:
    """state.json; also makes sure that this rank sees the files Megatron opens by itself."""
    try:
        for name in ("weights/common.pt", "weights/metadata.json", "weights/.metadata"):
            (path / name).open("rb").close()
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({_first_line(error)}); run.dir must be on a disk "
            "that all machines of the run share"
        ) from error


def _read(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        loaded = dist_checkpointing.load(sharded, str(path / "weights"))
    except CheckpointException as error:  # on every rank, whichever failed
        raise CheckpointError(f"{path} does not fit this model: {_first_failure(error)}") from error
    assert isinstance(loaded, dict)
    return loaded


def _digests(folder: Path) -> dict[str, str]:
    """sha256 by file name, on every rank; the work is shared out over the ranks."""
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    names = gather_objects(found)[0]  # one list for all: shared disks show new files late
    mine = names[dist.get_rank() :: dist.get_world_size()]
    hashed = on_all_ranks(lambda: _guarded(folder, lambda: {n: _digest(folder / n) for n in mine}))
    return {name: digest for part in gather_objects(hashed) for name, digest in part.items()}


def _publish(temporary: Path, final: Path, digests: dict[str, str]) -> None:
    """Manifest, all to disk, and only then the name that makes it a checkpoint."""
    _write_json(temporary / "manifest.json", digests)
    for name in [*digests, "manifest.json"]:
        _sync(temporary / name)
    for folder in [*temporary.rglob("*/"), temporary]:
        _sync(folder)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(final.parent)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _local_bytes(tensors: Any) -> int:
    """What this rank writes (of a tensor that several ranks hold, one of them writes it)."""
    shards = [t for t in nested_values(tensors) if isinstance(t, ShardedTensor)]
    return sum(
        t.data.nbytes for t in shards if t.data is not None and is_main_replica(t.replica_id)
    )


def _first_failure(error: CheckpointException) -> str:
    if not error.failures:
        return "another rank failed"
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {_first_line(cause)}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
