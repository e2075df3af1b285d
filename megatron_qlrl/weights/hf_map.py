"""One table between Megatron's parameter names and Hugging Face's, used in both directions.

Each entry knows which Hugging Face tensors make up one Megatron parameter, how they are laid
out in it, and how it is cut over tensor parallel ranks:

    column   rows are cut                     embedding, output layer, QKV, gate/up
    row      columns are cut                  attention output, MLP down
    whole    every rank holds a copy          norms, router
    expert   not cut: each expert parallel    an expert's gate/up, an expert's down
             rank holds other experts

QKV is interleaved by key/value group: (q ... q k v) for each group; gate and up are cut
separately and then joined. The vocabulary is padded with zero rows. A Megatron name with an
expert's number stands for another expert on each expert parallel rank, so its entry has the tensors
of them all.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_qlrl.config.shape import ModelShape, hf_shapes

Kind = Literal["vocab", "qkv", "gate_up", "row", "whole", "expert"]
# Reads rows [a, b) (or, with columns=True, columns) of a Hugging Face tensor.
ReadSlice = Callable[[str, int, int, bool], torch.Tensor]

_LAYER: dict[str, tuple[Kind, list[str]]] = {
    "self_attention.linear_qkv.weight": (
        "qkv",
        ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    ),
    "self_attention.linear_qkv.bias": (
        "qkv",
        ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    ),
    "self_attention.linear_proj.weight": ("row", ["self_attn.o_proj.weight"]),
    "self_attention.q_layernorm.weight": ("whole", ["self_attn.q_norm.weight"]),
    "self_attention.k_layernorm.weight": ("whole", ["self_attn.k_norm.weight"]),
    "mlp.linear_fc1.weight": ("gate_up", ["mlp.gate_proj.weight", "mlp.up_proj.weight"]),
    "mlp.linear_fc2.weight": ("row", ["mlp.down_proj.weight"]),
    "mlp.router.weight": ("whole", ["mlp.gate.weight"]),
    "input_layernorm.weight": ("whole", ["input_layernorm.weight"]),
    "pre_mlp_layernorm.weight": ("whole", ["post_attention_layernorm.weight"]),
    # Transformer Engine fuses these norms into the linear layer that follows.
    "self_attention.linear_qkv.layer_norm_weight": ("whole", ["input_layernorm.weight"]),
    "mlp.linear_fc1.layer_norm_weight": ("whole", ["post_attention_layernorm.weight"]),
}
# Megatron's own linear layers, and Transformer Engine's grouped ones.
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))"
)
_IN_EXPERT = {"linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",)}
_OUTSIDE: dict[str, tuple[Kind, list[str]]] = {
    "embedding.word_embeddings.weight": ("vocab", ["model.embed_tokens.weight"]),
    "decoder.final_layernorm.weight": ("whole", ["model.norm.weight"]),
    "output_layer.weight": ("vocab", ["lm_head.weight"]),
}


@dataclass(frozen=True)
class Entry:
    """Says how one Megatron parameter is made of Hugging Face tensors.

    Attributes:
        hf_names: of an expert's entry, those of the first expert parallel rank come first.
        ranks: the number of ranks that have other tensors under this Megatron name.
    """

    kind: Kind
    hf_names: tuple[str, ...]
    ranks: int = 1

    def names_on(self, rank: int) -> tuple[str, ...]:
        """Returns the Hugging Face tensors of expert parallel rank `rank`."""
        each = len(self.hf_names) // self.ranks
        return self.hf_names[each * rank : each * (rank + 1)]


def entry_of(
    name: str, *, first_layer: int, tied: bool, num_experts: int = 0, ep_size: int = 1
) -> Entry:
    """Returns the entry of a Megatron parameter.

    Args:
        first_layer: the first layer of the pipeline stage, counted over the whole model.
        tied: the model's LM head is its embedding, of which the last of several stages has a copy.
        num_experts: experts of a layer, divided over `ep_size` ranks in their order.
    """
    in_layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if not in_layer:
        if tied and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        kind, names = _OUTSIDE[name]
        return Entry(kind, tuple(names))
    prefix = f"model.layers.{first_layer + int(in_layer[1])}."
    if in_expert := _EXPERT.fullmatch(in_layer[2]):
        local, each = int(in_expert[1] or in_expert[4]), num_experts // ep_size
        names = [
            f"{prefix}mlp.experts.{rank * each + local}.{part}.weight"
            for rank in range(ep_size)
            for part in _IN_EXPERT[in_expert[2] or in_expert[3]]
        ]
        return Entry("expert", tuple(names), ep_size)
    kind, names = _LAYER[in_layer[2]]
    return Entry(kind, tuple(prefix + n for n in names))


def local_shard(
    entry: Entry,
    read: ReadSlice,
    *,
    shape: ModelShape,
    tp_size: int,
    tp_rank: int,
    rows: int,
    ep_rank: int = 0,
) -> torch.Tensor:
    """Returns this rank's Megatron tensor and reads only the rows or columns that it needs.

    `rows` is the local parameter's first dimension (it tells the padding of the vocabulary).
    """
    if entry.kind == "expert":
        names = entry.names_on(ep_rank)
        return _join([read(name, 0, rows // len(names), False) for name in names])
    sizes = hf_shapes(shape)
    names = entry.hf_names
    if entry.kind == "whole":
        return read(names[0], 0, sizes[names[0]][0], False)
    if entry.kind == "row":
        width = sizes[names[0]][1] // tp_size
        return read(names[0], tp_rank * width, (tp_rank + 1) * width, True)
    if entry.kind == "vocab":
        start = min(tp_rank * rows, shape.vocab_size)
        end = min(start + rows, shape.vocab_size)
        real = read(names[0], start, end, False)
        padding = real.new_zeros(rows - real.shape[0], *real.shape[1:])
        return torch.cat([real, padding])
    if entry.kind == "gate_up":
        height = shape.ffn_size // tp_size
        return torch.cat([read(n, tp_rank * height, (tp_rank + 1) * height, False) for n in names])
    return _interleave(
        [read(n, *_share(sizes[n][0], tp_size, tp_rank), False) for n in names],
        groups=shape.num_kv_heads // tp_size,
    )


def to_hf(
    entry: Entry, shards: list[torch.Tensor], *, shape: ModelShape
) -> list[tuple[str, torch.Tensor]]:
    """Returns the Hugging Face tensors of a Megatron parameter, made of all its tensor parallel
    shards; of an expert's parameter, of those of all expert parallel ranks."""
    if entry.kind == "expert":
        tensors = [part for shard in shards for part in shard.chunk(len(entry.names_on(0)))]
        return list(zip(entry.hf_names, tensors, strict=True))
    if entry.kind == "whole":
        return [(entry.hf_names[0], shards[0])]
    parts = [_parts(entry, shard, shape=shape, tp_size=len(shards)) for shard in shards]
    tensors = [_join(list(same), _cut_dim(entry)) for same in zip(*parts, strict=True)]
    if entry.kind == "vocab":
        tensors = [tensor[: shape.vocab_size] for tensor in tensors]
    return list(zip(entry.hf_names, tensors, strict=True))


def to_hf_slices(
    entry: Entry, shard: torch.Tensor, *, shape: ModelShape, tp_size: int, tp_rank: int
) -> list[tuple[str, torch.Tensor]]:
    """Returns the Hugging Face tensors of a Megatron parameter in their full shape, of which only
    what this rank's shard holds is filled in; other rows or columns are not initialised."""
    if entry.kind == "whole":
        return [(entry.hf_names[0], shard)]
    sizes, dim = hf_shapes(shape), _cut_dim(entry)
    pairs = []
    for name, part in zip(
        entry.hf_names, _parts(entry, shard, shape=shape, tp_size=tp_size), strict=True
    ):
        tensor = part.new_empty(sizes[name])
        start = min(tp_rank * part.shape[dim], tensor.shape[dim])
        length = min(part.shape[dim], tensor.shape[dim] - start)  # the vocabulary may be padded
        tensor.narrow(dim, start, length).copy_(part.narrow(dim, 0, length))
        pairs.append((name, tensor))
    return pairs


def _cut_dim(entry: Entry) -> int:
    return 1 if entry.kind == "row" else 0


def _parts(
    entry: Entry, shard: torch.Tensor, *, shape: ModelShape, tp_size: int
) -> list[torch.Tensor]:
    """Returns what one of `tp_size` shards holds of each Hugging Face tensor of the entry."""
    if entry.kind == "gate_up":
        return list(shard.chunk(2))
    if entry.kind == "qkv":
        return _split_qkv(shard, shape=shape, groups=shape.num_kv_heads // tp_size)
    return [shard]


def _join(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Returns the parts side by side; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _share(size: int, parts: int, index: int) -> tuple[int, int]:
    return size // parts * index, size // parts * (index + 1)


def _interleave(qkv: list[torch.Tensor], *, groups: int) -> torch.Tensor:
    """[q rows], [k rows], [v rows] -> (q ... q k v) for each key/value group."""
    grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in qkv]
    return torch.cat(grouped, 1).reshape(-1, *qkv[0].shape[1:])


def _split_qkv(fused: torch.Tensor, *, shape: ModelShape, groups: int) -> list[torch.Tensor]:
    d = shape.head_dim
    per_group = shape.num_heads // shape.num_kv_heads
    grouped = fused.reshape(groups, -1, *fused.shape[1:])
    parts = grouped.split([per_group * d, d, d], 1)
    return [part.reshape(-1, *fused.shape[1:]) for part in parts]
