"""Checkpoints: taken in host memory, written aside by a thread, hashed, renamed.

    <run.dir>/checkpoints/step_00000012/
        weights/        model and optimizer (megatron_format.py); loads under another layout
        hf/             config and tokenizer, so that a checkpoint can be exported by itself
        state.json      everything else the run needs to go on: step, phase, data order,
                        curriculum, tracker
        manifest.json   sha256 of every other file; a folder whose files do not match is torn

The folder gets its name only when all of it is on disk, so a kill leaves either a good
checkpoint or a `.tmp` folder, which the next good save removes.

    training   --- snapshot ---> step ------> step ------> step --- wait, snapshot --->
    thread                       tensors, hashes, fsync, rename

The threads of all ranks agree over a process group of their own: collectives of two threads in
one group would mix.

Trust: the manifest proves a checkpoint whole, not harmless. Nothing that a file says is run when
it is read: stored.py, and `_Planner` in megatron_format.py.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_qlrl.config.run_folder import CHECKPOINTS, checkpoint_name, checkpoints_in, step_of
from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.parallel.collectives import gather_dicts, gather_objects, on_all_ranks
from megatron_qlrl.parallel.context import TIMEOUT
from megatron_qlrl.weights import megatron_format
from megatron_qlrl.weights.checkpoint_folder import (
    FORMAT,
    UNFIT,
    digest_of,
    first_line,
    open_checkpoint,
    torn,
)
from megatron_qlrl.weights.megatron_format import Snapshot, take_snapshot
from megatron_qlrl.weights.stored import StoredWeights

T = TypeVar("T")


class CheckpointStore:
    """The checkpoints of one run. All methods except `failed` are collective."""

    def __init__(self, folder: Path, *, keep: int, warn: Callable[[str], None]) -> None:
        """`warn` gets a line for each checkpoint that is passed over."""
        self.folder, self._keep, self._warn = folder, keep, warn
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        *,
        model: Any,
        optimizer: Any,
        state: Mapping[str, Any],
        companions: Callable[[Path], None] = lambda folder: None,
        spare: int | None = None,
    ) -> Path:
        """Takes a checkpoint and returns; a thread writes it to the path returned and removes all
        but the newest `keep` and the one of step `spare`. Waits for the save before it: there is
        one snapshot at a time.

        `companions` fills the checkpoint's hf/ folder (called on rank 0, by the thread).

        Raises:
            CheckpointError: it, or the one before, could not be written (every rank); earlier
                ones are untouched. What fails later is raised by `wait`.
        """
        self.wait()
        final = self.path(step)
        snapshot = take_snapshot(model, optimizer)
        needed = sum(gather_objects(snapshot.num_bytes, self._group))
        _on_rank_0(self.folder, lambda: self._prepare(_temporary(final), needed))
        text = json.dumps({"format": FORMAT, **state}, indent=1)  # now: the run changes it
        self._pending = self._thread.submit(self._write, snapshot, text, companions, final, spare)
        return final

    def path(self, step: int) -> Path:
        """Returns where the checkpoint of a step is, if there is one."""
        return self.folder / checkpoint_name(step)

    @cached_property
    def _group(self) -> dist.ProcessGroup:
        """The process group of the threads of all ranks, made at the first save."""
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        return group

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
            CheckpointError: it could not be written (every rank).
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def failed(self) -> bool:
        """Returns whether `wait` would raise at once."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def close(self) -> None:
        """Lets the thread finish writing before the process group ends. A failure that nobody
        waited for becomes a warning, because the run ends for another reason."""
        self._thread.shutdown()
        if self._pending is not None and (error := self._pending.exception()):
            self._warn(str(error))

    def newest(self) -> Path | None:
        """Returns the newest checkpoint whose files all match its manifest, the same on every rank,
        or None if there is none.

        Raises:
            CheckpointError: its files match but hold something else than a checkpoint of this
                package, or another version of the package wrote it.
        """
        self.wait()
        newest = on_all_ranks(self._newest if dist.get_rank() == 0 else lambda: None)
        return gather_objects(newest)[0]

    def _newest(self) -> Path | None:
        for folder in reversed(checkpoints_in(self.folder)):
            problem = torn(folder)
            if problem is None:
                open_checkpoint(folder)
                return folder
            self._warn(f"checkpoint {folder} is passed over: {problem}")
        return None

    def _prepare(self, temporary: Path, needed: int) -> None:
        _remove(temporary)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"disk full: a checkpoint needs about {needed / 1e9:.2f} GB and {self.folder} has "
                f"{free / 1e9:.2f} GB free; the last good checkpoint is untouched. Free space or "
                "set run.dir elsewhere, then start again: the run resumes"
            )
        (temporary / "weights").mkdir(parents=True)

    def _write(
        self,
        snapshot: Snapshot,
        state: str,
        companions: Callable[[Path], None],
        final: Path,
        spare: int | None,
    ) -> None:
        """The thread's work."""
        temporary, group = _temporary(final), self._group
        weights = temporary / "weights"

        def write_plain() -> None:
            snapshot.write_common(weights)
            companions(temporary / "hf")
            (temporary / "state.json").write_text(state)

        def finish() -> None:
            _publish(temporary, final, digests)
            self._remove_others(step_of(final), spare)

        try:
            _on_rank_0(temporary, write_plain, group)
            on_all_ranks(lambda: _write_tensors(snapshot, weights, group), group)
            digests = _digests(temporary, group)
            _on_rank_0(self.folder, finish, group)
        except CheckpointError:
            if dist.get_rank() == 0:  # half a checkpoint only fills the disk
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _remove_others(self, step: int, spare: int | None) -> None:
        """Removes all but the last `keep` checkpoints up to `step`, and that of `spare`. Those with
        a higher number were torn when the run resumed below them; if they counted, they would push
        good ones out."""
        folders = checkpoints_in(self.folder)
        kept = [f for f in folders if f <= self.path(step)][-self._keep :]
        if spare is not None:
            kept.append(self.path(spare))
        for folder in [*folders, *self.folder.glob(f"{CHECKPOINTS}.tmp")]:
            if folder not in kept:
                _remove(folder)


def load_checkpoint(path: Path, *, model: Any, optimizer: Any) -> dict[str, Any]:
    """Fills model and optimizer in place and returns the saved state.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or a rank cannot see it
            (every rank).
    """
    read = partial(megatron_format.read_all, model=model, optimizer=optimizer)
    return _load(path, read)


def load_weights(path: Path, *, model: Any) -> dict[str, Any]:
    """Fills the model alone, for export and for a new optimizer, and returns the saved state."""
    return _load(path, partial(megatron_format.read_model, model=model))


def _temporary(final: Path) -> Path:
    return final.with_name(f"{final.name}.tmp")


def _load(path: Path, read: Callable[[StoredWeights], None]) -> dict[str, Any]:
    state, stored = on_all_ranks(partial(open_checkpoint, path))

    def fill() -> None:
        try:
            read(stored)
        except CheckpointException as error:  # on every rank, whichever failed
            raise _does_not_fit(path, error) from error
        except (CheckpointingException, *UNFIT) as error:
            raise CheckpointError(f"{path} does not fit this model: {first_line(error)}") from error

    on_all_ranks(fill)
    return state


def _does_not_fit(path: Path, error: CheckpointException) -> CheckpointError:
    refusals = (cause for cause, _ in error.failures.values() if isinstance(cause, CheckpointError))
    fallback = CheckpointError(f"{path} does not fit this model: {_first_failure(error)}")
    return next(refusals, fallback)


def _remove(path: Path) -> None:
    """Removes a folder, or a link or file in its place; what a link points to stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _write_tensors(snapshot: Snapshot, weights: Path, group: dist.ProcessGroup) -> None:
    try:
        snapshot.write_tensors(weights, group)
    except CheckpointException as error:  # on every rank, whichever failed
        raise _cannot_write(weights, _first_failure(error)) from error


def _on_rank_0(where: Path, work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """Runs `work`, which uses the disk at `where`, on rank 0; its failure is every rank's."""
    return on_all_ranks(lambda: _guarded(where, work) if dist.get_rank() == 0 else None, group)


def _guarded(where: Path, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (OSError, RuntimeError) as error:  # torch's file writer raises RuntimeError
        raise _cannot_write(where, first_line(error)) from error


def _cannot_write(where: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint could not be written to {where} ({reason}); the last good checkpoint "
        "is untouched. Mend the disk or set run.dir elsewhere, then start again: the run resumes"
    )


def _digests(folder: Path, group: dist.ProcessGroup) -> dict[str, str]:
    """Returns the sha256 of each file by name, on every rank; the ranks share the work."""

    def names() -> list[str]:
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    # One list for all: shared disks show new files late.
    files = gather_objects(_on_rank_0(folder, names, group), group)[0]
    mine = files[dist.get_rank() :: dist.get_world_size()]

    def hashed() -> dict[str, str]:
        return _guarded(folder, lambda: {name: digest_of(folder / name) for name in mine})

    return gather_dicts(on_all_ranks(hashed, group), group)


def _publish(temporary: Path, final: Path, digests: dict[str, str]) -> None:
    """Writes the manifest, syncs all to disk, then gives the name that makes it a checkpoint."""
    (temporary / "manifest.json").write_text(json.dumps(digests, indent=1))
    for name in [*digests, "manifest.json"]:
        _sync(temporary / name)
    for folder in [*temporary.rglob("*/"), temporary]:
        _sync(folder)
    _remove(final)
    temporary.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_failure(error: CheckpointException) -> str:
    if not error.failures:
        return "another rank failed"
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {first_line(cause)}"
