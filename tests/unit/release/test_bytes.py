"""A folder against its checkpoint: every byte of weights, config and tokenizer."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_qlrl.config.shape import read_shape
from megatron_qlrl.errors import ReleaseError
from megatron_qlrl.release.bytes import compare_companions, compare_weights

Make = Callable[..., Path]


@pytest.fixture
def checkpoint(release_folder: Make, tmp_path: Path) -> Path:
    """A checkpoint's copy of config and tokenizer."""
    kept = tmp_path / "step_00000007" / "hf"
    shutil.copytree(release_folder(), kept)
    for name in ("README.md", "model.safetensors"):
        (kept / name).unlink()
    return kept.parent


def test_equal_files(release_folder: Make, checkpoint: Path) -> None:
    text = compare_companions(release_folder(), checkpoint)
    assert text == "3 files equal those of step_00000007, byte for byte"


def test_one_byte_of_the_template(release_folder: Make, checkpoint: Path) -> None:
    folder = release_folder()
    (folder / "chat_template.jinja").write_text("{{ messages }} ")
    with pytest.raises(ReleaseError, match=r"chat_template\.jinja differs from .*hf/chat_template"):
        compare_companions(folder, checkpoint)


def test_a_file_that_is_missing_or_new(release_folder: Make, checkpoint: Path) -> None:
    folder = release_folder()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(ReleaseError, match=r"model/vocab\.json is not in .*step_00000007/hf"):
        compare_companions(folder, checkpoint)
    (folder / "vocab.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ReleaseError, match=r"step_00000007/hf/tokenizer\.json is not in .*model;"):
        compare_companions(folder, checkpoint)


def compare(folder: Path, checkpoint: Path, tensors: dict[str, torch.Tensor]) -> str:
    shape = read_shape(folder, rope_scaling=None)
    return compare_weights(folder, tensors.items(), shape=shape, checkpoint=checkpoint)


def test_every_bit_of_the_weights(release_folder: Make, checkpoint: Path) -> None:
    folder = release_folder()
    tensors = load_file(folder / "model.safetensors")
    assert compare(folder, checkpoint, tensors).startswith(f"{len(tensors)} tensors equal those")
    name = "model.layers.3.mlp.up_proj.weight"
    changed = tensors[name].clone()
    changed[1, 2] = -0.0  # equal as a number, not as bytes
    with pytest.raises(ReleaseError, match=rf"tensor {name} differs .* in 1 of 6,144 numbers"):
        compare(folder, checkpoint, tensors | {name: changed})


def test_nan_equals_itself(release_folder: Make, checkpoint: Path) -> None:
    folder = release_folder()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    assert compare(folder, checkpoint, tensors)


def test_another_type_or_size(release_folder: Make, checkpoint: Path) -> None:
    folder = release_folder()
    tensors = load_file(folder / "model.safetensors")
    norm = tensors["model.norm.weight"]
    for other in (norm.double(), norm[:-1]):
        with pytest.raises(
            ReleaseError, match=r"tensor model\.norm\.weight is torch\.float32 \(64"
        ):
            compare(folder, checkpoint, tensors | {"model.norm.weight": other})
