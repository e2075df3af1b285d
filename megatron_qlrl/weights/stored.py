"""Reads what a checkpoint's weights/ folder holds beside the tensors, and trusts none of it.

A pickle can run any code, and torch and Megatron would unpickle these files. Here `.metadata` is
read by an unpickler that knows only the names which a checkpoint of this package holds. It makes
inert records of them; torch's objects are built from the records, each value checked. `common.pt`
is read with torch's `weights_only`, whatever the environment says.
"""

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_qlrl.errors import CheckpointError

FILES = ("common.pt", "metadata.json", ".metadata")
"""The files that reading needs beside those of the tensors."""

BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Megatron's name of the format, kept in metadata.json. (Megatron 0.19 reads the first two.)"""

EXTRA_STATE = "._extra_state"
"""Ends the name of what a layer keeps beside its weights. It is stored, under that name and the
layer's number, as the only objects that are no tensors."""

DAMAGED = (AttributeError, EOFError, IndexError, KeyError, MemoryError, OverflowError, TypeError,
            ValueError, pickle.UnpicklingError)  # fmt: skip
"""The errors that an unpickler raises on a damaged pickle."""


@dataclass(frozen=True)
class StoredWeights:
    """A checkpoint's weights/ folder, ready to be read from.

    Attributes:
        folder: where the tensors' files lie.
        metadata: which tensors there are and where each part of one lies.
        common: what all ranks have alike: the optimizer's parameter groups and counters.
    """

    folder: Path
    metadata: Metadata
    common: dict[str, Any]


def open_weights(folder: Path) -> StoredWeights:
    """Reads everything except the tensors, and runs nothing that a file says.

    Raises:
        CheckpointError: a file is damaged, or holds what no checkpoint of this package does.
        OSError: a file cannot be read.
    """
    file = folder / "metadata.json"
    try:
        format_name = read_object(file)
    except ValueError as error:
        raise refused(file, str(error)) from error
    if format_name != BACKEND:
        raise refused(file, f"it names another format than {BACKEND['sharded_backend']}")
    return StoredWeights(folder, _read_metadata(folder / ".metadata"), _read_common(folder))


def read_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a {type(value).__name__}, expected an object")
    return value


def refused(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is refused: {reason}. It is damaged, or somebody made it to run code where it is "
        "read; nothing of it was run. Copy the checkpoint again from where it was written, or "
        "remove its folder to go on from an older one"
    )


def _read_common(folder: Path) -> dict[str, Any]:
    file = folder / "common.pt"
    try:
        common = torch.load(file, map_location="cpu", weights_only=True)
    except (*DAMAGED, RuntimeError) as error:  # torch's own text offers to run the code after all
        raise refused(file, "it holds something else than plain values and tensors") from error
    if not isinstance(common, dict):
        raise refused(file, f"it holds a {type(common).__name__}, expected a dict")
    return common


class _Record:
    """Stands for an object in the pickle: keeps what the pickle says of it, and does nothing."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN: dict[tuple[str, str], type[_Record]] = {
    (module, name): type(name, (_Record,), {})
    for module, names in {
        _METADATA: "Metadata TensorStorageMetadata TensorProperties ChunkStorageMetadata "
        "BytesStorageMetadata MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch": "Size",
        "torch.serialization": "_get_layout",
        "pathlib": "PosixPath",
        "pathlib._local": "PosixPath",  # Python 3.13's name of it
    }.items()
    for name in names.split()
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "torch" and global_name in _DTYPES:
            return _DTYPES[global_name]
        known = _KNOWN.get((module_name, global_name))
        if known is None:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return known


def _read_metadata(file: Path) -> Metadata:
    with file.open("rb") as stream:
        try:
            return _metadata(_Unpickler(stream).load())
        except DAMAGED as error:
            raise refused(file, str(error) or type(error).__name__) from error


def _metadata(record: Any) -> Metadata:
    fields = _fields(record, "Metadata")
    entries = {name: _entry(name, entry) for name, entry in fields["state_dict_metadata"].items()}
    places = {_index(index): _place(place) for index, place in fields["storage_data"].items()}
    return Metadata(entries, storage_data=places)


def _entry(name: Any, record: Any) -> STORAGE_TYPES:
    if isinstance(record, _KNOWN[_METADATA, "BytesStorageMetadata"]):
        if f"{EXTRA_STATE}/" not in _text(name):
            raise TypeError(f"it says that {name} is an object and no tensor")
        return BytesStorageMetadata()
    fields = _fields(record, "TensorStorageMetadata")
    dtype = _record(fields["properties"], _METADATA, "TensorProperties").state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"it holds {type(dtype).__name__} where a dtype is due")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, "MetadataIndex")
    offset, number = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _text(fields["fqn"]),
        None if offset is None else _size(offset),
        None if number is None else _count(number),
    )


def _place(record: Any) -> _StorageInfo:
    fields = _record(record, "torch.distributed.checkpoint.filesystem", "_StorageInfo").state
    path = _text(fields["relative_path"])
    if not re.fullmatch(r"__\d+_\d+\.distcp", path):
        raise ValueError(f"it says that a tensor lies in {path}")
    if fields.keys() != {"relative_path", "offset", "length"}:
        raise ValueError(f"it says how to read a tensor: {sorted(fields)}")
    return _StorageInfo(path, _count(fields["offset"]), _count(fields["length"]))


def _record(value: Any, module: str, name: str) -> _Record:
    if not isinstance(value, _KNOWN[module, name]):
        raise TypeError(f"it holds {type(value).__name__} where {name} is due")
    return value


def _fields(value: Any, name: str) -> dict[str, Any]:
    return _record(value, _METADATA, name).state


def _size(value: Any) -> torch.Size:
    (numbers,) = _record(value, "torch", "Size").args
    return torch.Size([_count(number) for number in numbers])


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"it holds {type(value).__name__} where a count is due")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"it holds {type(value).__name__} where a name is due")
    return value
