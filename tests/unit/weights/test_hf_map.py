"""The weight table: layouts by hand, round trips, and the names of real models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import tiny_hf
from safetensors import safe_open

from megatron_qlrl.config.shape import ModelShape, hf_shapes
from megatron_qlrl.weights.hf_map import Entry, entry_of, local_shard, to_hf

# Two key/value groups of two query heads each; head size 2, not hidden / heads.
SHAPE = ModelShape(
    num_layers=3,
    hidden_size=6,
    ffn_size=10,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    vocab_size=13,
    max_position_embeddings=64,
    rms_eps=1e-6,
    tied=False,
    qkv_bias=True,
    qk_norm=True,
    rope={"rope_type": "default", "rope_theta": 1e4},
)


class Folder:
    """Hugging Face tensors by name, read slice by slice; every number in them is different."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        start = 0
        for name, size in hf_shapes(SHAPE).items():
            count = int(torch.Size(size).numel())
            self.tensors[name] = torch.arange(start, start + count).reshape(size)
            start += count

    def read(self, name: str, start: int, end: int, columns: bool) -> torch.Tensor:
        tensor = self.tensors[name]
        size = tensor.shape[1 if columns else 0]
        assert 0 <= start <= end <= size, (name, start, end, size)
        return tensor[:, start:end] if columns else tensor[start:end]


def shards(entry: Entry, folder: Folder, tp: int, rows: int = 0) -> list[torch.Tensor]:
    return [
        local_shard(entry, folder.read, shape=SHAPE, tp_size=tp, tp_rank=rank, rows=rows)
        for rank in range(tp)
    ]


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_qkv_is_interleaved_by_key_value_group(part: str) -> None:
    """Heads q0 q1 q2 q3, k0 k1, v0 v1 lie as q0 q1 k0 v0 | q2 q3 k1 v1."""
    prefix = "model.layers.0.self_attn"
    folder = Folder()
    wide = (6,) if part == "weight" else ()
    for letter, heads in (("q", 4), ("k", 2), ("v", 2)):
        code = {"q": 100, "k": 200, "v": 300}[letter]
        rows = torch.tensor([code + 10 * head + d for head in range(heads) for d in range(2)])
        tensor = rows.reshape(-1, *[1 for _ in wide]).expand(-1, *wide)
        folder.tensors[f"{prefix}.{letter}_proj.{part}"] = tensor
    entry = entry_of(
        f"decoder.layers.0.self_attention.linear_qkv.{part}", first_layer=0, tied=False
    )
    (whole,) = shards(entry, folder, 1)
    found = whole[:, 0] if wide else whole
    first = [100, 101, 110, 111, 200, 201, 300, 301]
    second = [120, 121, 130, 131, 210, 211, 310, 311]
    assert found.tolist() == first + second
    halves = shards(entry, folder, 2)
    assert [(h[:, 0] if wide else h).tolist() for h in halves] == [first, second]


def test_gate_and_up_are_cut_before_they_are_joined() -> None:
    folder = Folder()
    for code, name in ((100, "gate"), (200, "up")):
        rows = torch.arange(code, code + 10)[:, None].expand(-1, 6)
        folder.tensors[f"model.layers.0.mlp.{name}_proj.weight"] = rows
    entry = entry_of("decoder.layers.0.mlp.linear_fc1.weight", first_layer=0, tied=False)
    first, second = shards(entry, folder, 2)
    assert first[:, 0].tolist() == [100, 101, 102, 103, 104, 200, 201, 202, 203, 204]
    assert second[:, 0].tolist() == [105, 106, 107, 108, 109, 205, 206, 207, 208, 209]


def test_vocabulary_is_padded_with_zeros_at_its_end() -> None:
    folder = Folder()
    entry = entry_of("output_layer.weight", first_layer=0, tied=False)
    real = folder.tensors["lm_head.weight"]
    first, second = shards(entry, folder, 2, rows=8)  # 13 tokens in 16 rows
    assert torch.equal(first, real[:8])
    assert torch.equal(second[:5], real[8:])
    assert torch.equal(second[5:], torch.zeros(3, 6, dtype=torch.long))
    first, second = shards(entry, folder, 2, rows=16)  # nothing real on the second rank
    assert torch.equal(first[:13], real)
    assert torch.equal(second, torch.zeros(16, 6, dtype=torch.long))


MEGATRON_NAMES = [
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_layernorm.weight",
    *(
        f"decoder.layers.1.{name}"
        for name in (
            "input_layernorm.weight",
            "self_attention.linear_qkv.weight",
            "self_attention.linear_qkv.bias",
            "self_attention.q_layernorm.weight",
            "self_attention.k_layernorm.weight",
            "self_attention.linear_proj.weight",
            "pre_mlp_layernorm.weight",
            "mlp.linear_fc1.weight",
            "mlp.linear_fc2.weight",
            # Transformer Engine's names of the norms
            "self_attention.linear_qkv.layer_norm_weight",
            "mlp.linear_fc1.layer_norm_weight",
        )
    ),
]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MEGATRON_NAMES)
def test_there_and_back_is_the_identity(name: str, tp: int) -> None:
    folder = Folder()
    entry = entry_of(name, first_layer=1, tied=False)
    cut = shards(entry, folder, tp, rows=16 // tp)
    assert len({part.shape for part in cut}) == 1
    back = to_hf(entry, cut, shape=SHAPE)
    assert [hf_name for hf_name, _ in back] == list(entry.hf_names)
    for hf_name, tensor in back:
        assert torch.equal(tensor, folder.tensors[hf_name]), hf_name


def test_layers_are_numbered_from_the_stages_first() -> None:
    entry = entry_of("decoder.layers.1.mlp.linear_fc2.weight", first_layer=24, tied=False)
    assert entry == Entry("row", ("model.layers.25.mlp.down_proj.weight",))


def test_the_table_covers_every_tensor_of_the_model() -> None:
    names = [n for n in MEGATRON_NAMES if "layers" not in n]
    inside = [n.removeprefix("decoder.layers.1.") for n in MEGATRON_NAMES if "layers" in n]
    names += [f"decoder.layers.{i}.{n}" for i in range(3) for n in inside]
    covered = {hf for name in names for hf in entry_of(name, first_layer=0, tied=False).hf_names}
    assert covered == set(hf_shapes(SHAPE))


@pytest.mark.parametrize(
    "name", ["mlp.experts.local_experts.1.linear_fc1.weight", "mlp.experts.linear_fc1.weight1"]
)
def test_an_expert_stands_for_another_one_on_each_rank(name: str) -> None:
    """Of 6 experts rank 0 has 0, 1, 2 and rank 1 has 3, 4, 5; gate lies above up."""
    entry = entry_of(
        f"decoder.layers.1.{name}", first_layer=2, tied=False, num_experts=6, ep_size=2
    )
    in_expert = "model.layers.3.mlp.experts"
    assert entry.names_on(1) == (f"{in_expert}.4.gate_proj.weight", f"{in_expert}.4.up_proj.weight")
    tensors = {n: torch.full((5, 6), i) for i, n in enumerate(entry.hf_names)}

    def read(name: str, start: int, end: int, columns: bool) -> torch.Tensor:
        return tensors[name][start:end]

    shards = [
        local_shard(entry, read, shape=SHAPE, tp_size=2, tp_rank=1, rows=10, ep_rank=rank)
        for rank in (0, 1)
    ]
    assert [shard[::5, 0].tolist() for shard in shards] == [[0, 1], [2, 3]]
    for whole, (hf_name, tensor) in zip(
        tensors.items(), to_hf(entry, shards, shape=SHAPE), strict=True
    ):
        assert whole[0] == hf_name and torch.equal(whole[1], tensor)


def test_tied_head_is_the_embedding() -> None:
    head = entry_of("output_layer.weight", first_layer=0, tied=True)
    assert head == Entry("vocab", ("model.embed_tokens.weight",))
    assert head == entry_of("embedding.word_embeddings.weight", first_layer=0, tied=True)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_moe", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_manifest_is_what_transformers_saves(tmp_path: Path, kind: str, tied: bool) -> None:
    folder = tiny_hf(tmp_path / kind, kind, tie_word_embeddings=tied)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        saved = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    assert hf_shapes(ModelShape.from_hf(config)) == saved
    assert ("lm_head.weight" in saved) is not tied
