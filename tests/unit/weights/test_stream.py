"""Buckets, safetensors shards and the errors of a folder that is not what it should be."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_qlrl.config.shape import ModelShape, hf_shapes
from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.weights.hf_map import Entry
from megatron_qlrl.weights.stream import _buckets, _Item, load_hf, write_hf

SHAPE = ModelShape.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 5,
        "max_position_embeddings": 8,
        "rms_norm_eps": 1e-6,
    }
)


class Stream:
    """Stands in for a WeightStream: named tensors, tied or not."""

    def __init__(self, tensors: dict[str, torch.Tensor], *, tied: bool = False) -> None:
        self.tensors, self.tied = tensors, tied

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()


def items(*sizes: int, stage: int = 0) -> list[_Item]:
    entry = Entry("whole", ("x",))
    return [_Item(f"p{n}", stage, entry, (n,), n) for n in sizes]


def test_buckets_hold_neighbours_of_one_stage_up_to_the_limit() -> None:
    plan = [*items(4, 6, 1, 25, 3), *items(2, 8, stage=1)]
    found = _buckets(plan, limit=10)
    # 25 is larger than a bucket and gets its own; 3 and 2 lie on different stages
    assert [[i.numel for i in bucket] for bucket in found] == [[4, 6], [1], [25], [3], [2, 8]]
    assert [i for bucket in found for i in bucket] == plan


TENSORS = {f"t{i}": torch.full((i + 1, 4), float(i)) for i in range(4)}  # 16, 32, 48, 64 bytes


def test_small_model_is_one_file(tmp_path: Path) -> None:
    stream: Any = Stream(TENSORS)
    write_hf(stream, tmp_path, shard_bytes=1000, writer=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_large_model_is_shards_with_an_index(tmp_path: Path) -> None:
    stream: Any = Stream(TENSORS)
    write_hf(stream, tmp_path, shard_bytes=60, writer=True)
    # 16 + 32 fit into 60, 48 does not fit with them, 64 is larger than a shard
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 160}
    assert index["weight_map"] == {"t0": files[0], "t1": files[0], "t2": files[1], "t3": files[2]}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])


class Counting(Stream):
    """Notes what was read: gathering is collective, so every rank must read all of it."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.seen: list[str] = []
        for pair in super().__iter__():
            self.seen.append(pair[0])
            yield pair


def test_other_ranks_iterate_but_write_nothing(tmp_path: Path) -> None:
    stream: Any = Counting(TENSORS)
    write_hf(stream, tmp_path, shard_bytes=60, writer=False)
    assert stream.seen == list(TENSORS)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_writer_reads_on(tmp_path: Path) -> None:
    stream: Any = Counting(TENSORS)
    with pytest.raises(CheckpointError, match="cannot write the model folder"):
        write_hf(stream, tmp_path / "missing", shard_bytes=20, writer=True)
    assert stream.seen == list(TENSORS)


@pytest.fixture(scope="module")
def alone(lone_group: Any) -> Any:
    """The context of a single rank in a gloo group of its own."""
    axis = SimpleNamespace(size=1, rank=0, group=lone_group)
    return SimpleNamespace(tp=axis, pp=axis, ep=axis)


class Norm(torch.nn.Module):
    """A model of which only the final norm is on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Module()
        self.decoder.final_layernorm = torch.nn.LayerNorm(4, bias=False)


def folder_of(path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {name: torch.randn(size) for name, size in hf_shapes(SHAPE).items()}
    save_file(tensors, path / "model.safetensors")
    return tensors


def test_load_fills_the_parameters(tmp_path: Path, alone: Any) -> None:
    tensors, model = folder_of(tmp_path), Norm()
    load_hf(tmp_path, model, shape=SHAPE, context=alone)
    weight = next(model.parameters())
    assert torch.equal(weight, tensors["model.norm.weight"])
    assert weight.requires_grad


def test_folder_without_a_tensor(tmp_path: Path, alone: Any) -> None:
    tensors = folder_of(tmp_path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is missing"):
        load_hf(tmp_path, Norm(), shape=SHAPE, context=alone)


def test_folder_with_another_shape(tmp_path: Path, alone: Any) -> None:
    tensors = folder_of(tmp_path)
    save_file(tensors | {"model.norm.weight": torch.ones(7)}, tmp_path / "model.safetensors")
    message = r"model\.norm\.weight has shape \(7,\), config\.json asks for \(4,\)"
    with pytest.raises(CheckpointError, match=message):
        load_hf(tmp_path, Norm(), shape=SHAPE, context=alone)


def test_file_that_is_cut_off(tmp_path: Path, alone: Any) -> None:
    folder_of(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load_hf(tmp_path, Norm(), shape=SHAPE, context=alone)


def test_folder_without_weights(tmp_path: Path, alone: Any) -> None:
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors file"):
        load_hf(tmp_path, Norm(), shape=SHAPE, context=alone)
