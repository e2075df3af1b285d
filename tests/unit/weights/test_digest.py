"""Folders of a few tensors, written by safetensors itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.weights.digest import weights_digest


def _tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    big = torch.arange(10_000, dtype=torch.float32).reshape(100, 100)  # 40,000 bytes, ten blocks
    return {"big": big, "norm": torch.ones(3), "empty": torch.ones(0)} | changes


def _whole(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_same_tensors_in_other_files_are_the_same_model(tmp_path: Path) -> None:
    split = tmp_path / "split"
    split.mkdir()
    tensors = _tensors()
    save_file({"norm": tensors["norm"], "empty": tensors["empty"]}, split / "b.safetensors")
    save_file({"big": tensors["big"]}, split / "a.safetensors")
    save_file({"big": tensors["big"] + 1}, split / "stale.safetensors")
    where = {"norm": "b.safetensors", "empty": "b.safetensors", "big": "a.safetensors"}
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert weights_digest(split) == weights_digest(_whole(tmp_path / "whole", tensors))


@pytest.mark.parametrize(
    "other",
    [
        {"norm": torch.tensor([1.0, 1.0, 1.0 + 2**-23])},
        {"norm": torch.ones(3, dtype=torch.float64)},
        {"norm": torch.ones(3, 1)},
        {"big": torch.arange(10_000, dtype=torch.float32).reshape(100, 100) + 1},
        {"more": torch.ones(1)},
    ],
)
def test_other_weights_are_another_model(tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
    one, two = _whole(tmp_path / "1", _tensors()), _whole(tmp_path / "2", _tensors(**other))
    assert weights_digest(one) != weights_digest(two)


def test_damaged_file(tmp_path: Path) -> None:
    folder = _whole(tmp_path / "1", _tensors())
    (folder / "model.safetensors").write_bytes(b"\x08\0\0")
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights_digest(folder)


def test_a_file_that_is_not_read_does_not_count(tmp_path: Path) -> None:
    folder = _whole(tmp_path / "m", _tensors())
    before = weights_digest(folder)
    save_file({"big": torch.zeros(2)}, folder / "consolidated.safetensors")
    assert weights_digest(folder) == before
