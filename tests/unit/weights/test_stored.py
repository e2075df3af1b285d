"""The files beside the tensors: what a checkpoint of ours holds is read, all else is refused."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path, PosixPath
from random import Random
from typing import Any

import pytest
import torch
from checkpoints import FORMAT_NAME
from fuzz import check_cases, mutate_bytes
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.weights.stored import open_weights

EXTRA = "decoder.layers.mlp.linear_fc2._extra_state/shard_0_1"
COMMON = {"optimizer": {"param_groups": [{"lr": 0.5, "betas": (0.9, 0.95), "step": 3}]}}


def metadata() -> Metadata:
    """Of a weight in two parts and of an object, as torch's saver makes it."""
    chunks = [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3])),
        ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([2, 3])),
    ]
    tensor = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([4, 3]), chunks)
    return Metadata(
        {"w": tensor, EXTRA: BytesStorageMetadata()},
        storage_data={
            MetadataIndex("w", [0, 0], 0): _StorageInfo("__0_0.distcp", 0, 100),
            MetadataIndex("w", [2, 0], 1): _StorageInfo("__1_0.distcp", 0, 100),
            MetadataIndex(EXTRA): _StorageInfo("__0_0.distcp", 100, 50),
        },
        storage_meta=StorageMeta(PosixPath("/a/b"), "save", None),
        version="1.0.0",
    )


def write(folder: Path, found: Any) -> Path:
    (folder / "metadata.json").write_text(json.dumps(FORMAT_NAME))
    torch.save(COMMON, folder / "common.pt")
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    return folder


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    stored = open_weights(write(tmp_path, metadata()))
    assert stored.common == COMMON
    assert stored.metadata.state_dict_metadata == metadata().state_dict_metadata
    assert stored.metadata.storage_data == metadata().storage_data
    numbers = {index.offset: index.index for index in stored.metadata.storage_data}
    assert numbers == {torch.Size([0, 0]): 0, torch.Size([2, 0]): 1, None: None}


class Calls:
    """Unpickled, calls `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def _with(change: Callable[[Metadata], object]) -> Metadata:
    changed = metadata()
    change(changed)
    return changed


def _place(**changes: Any) -> Metadata:
    """One part of the weight lies elsewhere."""
    return _with(
        lambda m: m.storage_data.update(
            {MetadataIndex("w", [0, 0], 0): _StorageInfo(*({
                "relative_path": "__0_0.distcp", "offset": 0, "length": 1,
                "transform_descriptors": None,
            } | changes).values())}
        )
    )  # fmt: skip


def _tensor(properties: Any, size: Any, chunks: Any) -> Metadata:
    entry = TensorStorageMetadata(properties, size, chunks)
    return _with(lambda m: m.state_dict_metadata.update(w=entry))


GOOD = TensorProperties(torch.float32)
REFUSED: dict[str, Callable[[Path], Any]] = {
    "names posix.mkdir": lambda at: Calls(os.mkdir, str(at)),
    "names builtins.eval": lambda at: Calls(eval, f"__import__('os').mkdir({str(at)!r})"),
    "names builtins.getattr": lambda at: Calls(getattr, torch.nn.Module, "load"),
    "names collections.OrderedDict": lambda at: _with(
        lambda m: setattr(m, "planner_data", __import__("collections").OrderedDict(a=1))
    ),
    "names torch.serialization.load": lambda at: Calls(torch.load, str(at)),
    "names torch._utils._rebuild_tensor_v2": lambda at: _with(
        lambda m: setattr(m, "planner_data", torch.zeros(1))
    ),
    "dict where Metadata is due": lambda at: {},
    "lies in ../../../etc/passwd": lambda at: _place(relative_path="../../../etc/passwd"),
    "lies in /dev/zero": lambda at: _place(relative_path="/dev/zero"),
    "how to read a tensor": lambda at: _place(transform_descriptors=["stream.zstd/1"]),
    "int where a name is due": lambda at: _place(relative_path=7),
    "str where a count is due": lambda at: _place(offset="0"),
    "bool where a count is due": lambda at: _place(length=True),
    "w is an object and no tensor": lambda at: _with(
        lambda m: m.state_dict_metadata.update(w=BytesStorageMetadata())
    ),
    "tuple where Size is due": lambda at: _tensor(GOOD, (4, 3), []),
    "float where a count is due": lambda at: _tensor(GOOD, Calls(torch.Size, (4.0,)), []),
    "where a dtype is due": lambda at: _tensor(TensorProperties("float32"), torch.Size([4]), []),  # pyright: ignore
    "where TensorProperties is due": lambda at: _tensor(None, torch.Size([4]), []),
    "where ChunkStorageMetadata is due": lambda at: _tensor(GOOD, torch.Size([4]), [1]),
    "not iterable": lambda at: _tensor(GOOD, torch.Size([4]), None),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_metadata_is_refused_by_name(tmp_path: Path, reason: str) -> None:
    try:
        write(tmp_path, REFUSED[reason](tmp_path / "marker"))
        with pytest.raises(CheckpointError) as caught:
            open_weights(tmp_path)
    finally:
        assert not (tmp_path / "marker").exists()
    assert str(caught.value).startswith(f"{tmp_path}/.metadata is refused: ")
    assert reason in str(caught.value)
    assert "nothing of it was run" in str(caught.value)


def test_a_record_cannot_be_changed_for_later_readers(tmp_path: Path) -> None:
    """BUILD with a class in place of an object sets the class' attributes in pickle."""
    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    attack = name + b"N(V__init__\nVx\nd\x86b."  # (None, {"__init__": "x"})
    write(tmp_path, None)
    (tmp_path / ".metadata").write_bytes(attack)
    with pytest.raises(CheckpointError, match=r"\.metadata is refused"):
        open_weights(tmp_path)
    open_weights(write(tmp_path, metadata()))


@pytest.mark.parametrize("content", [b"", b"\x80", pickle.dumps(metadata())[:-20], b"junk"])
def test_damaged_metadata_is_named(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, None)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata is refused: .*damaged"):
        open_weights(tmp_path)


def test_damaged_common_file_is_named(tmp_path: Path, fuzz_cases: int) -> None:
    write(tmp_path, metadata())
    file = tmp_path / "common.pt"
    good = file.read_bytes()

    def damage(rng: Random) -> None:
        file.write_bytes(mutate_bytes(good, rng))

    counts = check_cases(damage, lambda: open_weights(tmp_path), cases=fuzz_cases)
    assert counts["CheckpointError"] > fuzz_cases // 10


def test_a_list_is_no_common_state(tmp_path: Path) -> None:
    write(tmp_path, metadata())
    torch.save([1], tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt is refused: it holds a list"):
        open_weights(tmp_path)
