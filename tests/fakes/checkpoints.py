"""Checkpoints made by hand: whole ones without a tensor, and ones that would run code where they
are read, with checksums that fit."""

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

FORMAT_NAME = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def write_checkpoint(folder: Path, state: Any) -> Path:
    """A whole checkpoint without a tensor."""
    weights = folder / "weights"
    weights.mkdir(parents=True)
    torch.save({}, weights / "common.pt")
    (weights / "metadata.json").write_text(json.dumps(FORMAT_NAME))
    (weights / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)
    return folder


def tampered(source: Path, target: Path, tamper: Callable[[Path], None]) -> Path:
    """A copy of a checkpoint, changed by `tamper`, with the checksums of what it then holds."""
    shutil.copytree(source, target)
    tamper(target)
    seal(target)
    return target


def seal(folder: Path, **others: Any) -> None:
    """Writes the manifest anew, with entries changed."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json"]
    digests = {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
    }
    (folder / "manifest.json").write_text(json.dumps(digests | others))


def pickled_file(name: str, payload: Payload) -> Callable[[Path], None]:
    """The file is nothing but the payload."""
    return lambda folder: (folder / "weights" / name).write_bytes(pickle.dumps(payload))


def within_metadata(payload: Payload) -> Callable[[Path], None]:
    """Good metadata with the payload where torch keeps a planner's notes."""

    def tamper(folder: Path) -> None:
        _change_metadata(folder, lambda metadata: setattr(metadata, "planner_data", payload))

    return tamper


def entry(name: str, content: Any) -> Callable[[Path], None]:
    """What is stored as `name` is `content`, a pickled object and no tensor."""

    def tamper(folder: Path) -> None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        file = folder / "weights" / "__0_0.distcp"
        offset = file.stat().st_size
        with file.open("ab") as stream:
            stream.write(buffer.getvalue())

        def change(metadata: Any) -> None:
            places = metadata.storage_data
            index, place = next((i, p) for i, p in places.items() if i.fqn == name)
            del places[index]
            places[type(index)(name)] = replace(place, offset=offset, length=len(buffer.getvalue()))
            metadata.state_dict_metadata[name] = BytesStorageMetadata()

        _change_metadata(folder, change)

    return tamper


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def state(**changes: Any) -> Callable[[Path], None]:
    """Other values in state.json."""

    def tamper(folder: Path) -> None:
        file = folder / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return tamper


def _change_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    file = folder / "weights" / ".metadata"
    metadata = pickle.loads(file.read_bytes())  # the test's own
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))
