"""Segment attention: a list of (query range, key range) pieces on stock kernels, merged exactly.

One path for everything: a plain sequence is one causal piece; a shared prompt adds one
non-causal piece of all its responses on the prompt; context parallelism only changes which
queries are local. A kernel that returns the log-sum-exp of its scores is enough, because

    softmax over A u B = (e^{lse_A} out_A + e^{lse_B} out_B) / (e^{lse_A} + e^{lse_B})

and a flash kernel's backward, called with the MERGED output and log-sum-exp, gives this
piece's exact share of the gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule

from megatron_qlrl.parallel.collectives import GatherTokens
from megatron_qlrl.types import Piece


@dataclass
class AttentionPlan(PackedSeqParams):
    """What the core attention needs of a micro-batch.

    It travels through Megatron's layers in the `packed_seq_params` argument, the one that
    every layer hands on untouched (also under activation recomputation); `qkv_format` must
    not say "thd", or Megatron would interpret the fields.
    """

    pieces: tuple[Piece, ...] = ()
    kv_index: torch.Tensor | None = None


class SegmentAttention(MegatronModule):
    """Drop-in for Megatron's core attention (no parameters)."""

    def __init__(
        self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.cp_group = pg_collection.cp
        self.kernel = _cuda_flash if torch.cuda.is_available() else _cpu_flash

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: AttentionPlan,
        **_: Any,
    ) -> torch.Tensor:
        """query [L, 1, heads, d], key and value [L, 1, kv_heads, d] -> [L, 1, heads * d]."""
        keys, values = key[:, 0], value[:, 0]
        if self.cp_group.size() > 1:
            keys = GatherTokens.apply(keys, self.cp_group)
            values = GatherTokens.apply(values, self.cp_group)
        if packed_seq_params.kv_index is not None:
            keys = keys.index_select(0, packed_seq_params.kv_index)
            values = values.index_select(0, packed_seq_params.kv_index)
        out = segment_attention(
            query[:, 0], keys, values, packed_seq_params.pieces, self.scale, self.kernel
        )
        return out.reshape(out.shape[0], 1, -1)


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pieces: tuple[Piece, ...],
    scale: float,
    kernel: "type[_cpu_flash] | type[_cuda_flash] | None" = None,
) -> torch.Tensor:
    """Attention of [L, heads, d] on [T, kv_heads, d] by `pieces` -> [L, heads, d].

    Queries that no piece mentions (padding) get zeros. heads must be a multiple of kv_heads.
    """
    return _SegmentAttention.apply(query, key, value, pieces, scale, kernel or _cpu_flash)


class _cpu_flash:
    """aten's CPU flash kernel; float32, float64 and bfloat16. A namespace of two functions,
    one per direction."""

    @staticmethod
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )

    @staticmethod
    def backward(
        grads: tuple[torch.Tensor, ...], causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *grads, 0.0, causal, scale=scale
        )


class _cuda_flash:
    """aten's CUDA flash kernel (bfloat16). Not run on a GPU yet."""

    @staticmethod
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, scale=scale
        )
        return found[0], found[1]

    @staticmethod
    def backward(
        grads: tuple[torch.Tensor, ...], causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k = grads[1], grads[2]
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *grads, None, None, q.shape[2], k.shape[2], 0.0, causal, no_dropout[0], no_dropout[1],
            scale=scale,
        )  # fmt: skip


class _SegmentAttention(torch.autograd.Function):
    """Heads are folded as batch = kv head, head = query head of its group, so that grouped
    keys and values are shared by a stride of 0 instead of being copied."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pieces: tuple[Piece, ...],
        scale: float,
        kernel: Any,
    ) -> torch.Tensor:
        q, k, v = _fold(query, key.shape[1]), _fold_kv(key, query), _fold_kv(value, query)
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        # At least float32: this is what the pieces are weighed by.
        lse_type = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=lse_type, device=q.device)
        for p in pieces:
            part, part_lse = kernel.forward(
                q[:, :, p.q0 : p.q1], k[:, :, p.k0 : p.k1], v[:, :, p.k0 : p.k1], p.causal, scale
            )
            here = slice(p.q0, p.q1)
            merged = torch.logaddexp(lse[:, :, here], part_lse)
            old_share = torch.exp(lse[:, :, here] - merged).unsqueeze(-1)
            new_share = torch.exp(part_lse - merged).unsqueeze(-1)
            out[:, :, here] = (out[:, :, here] * old_share + part * new_share).to(out.dtype)
            lse[:, :, here] = merged
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.pieces, ctx.scale, ctx.kernel = pieces, scale, kernel
        return _unfold(out, query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        q, k, v = _fold(query, key.shape[1]), _fold_kv(key, query), _fold_kv(value, query)
        grad_out = _fold(grads[0].contiguous(), key.shape[1])
        dq = torch.zeros_like(out)
        dk = key.new_zeros(key.shape[1], key.shape[0], key.shape[2])
        dv = torch.zeros_like(dk)
        for p in ctx.pieces:
            here, there = slice(p.q0, p.q1), slice(p.k0, p.k1)
            part_q, part_k, part_v = ctx.kernel.backward(
                (
                    grad_out[:, :, here],
                    q[:, :, here],
                    k[:, :, there],
                    v[:, :, there],
                    out[:, :, here],
                    lse[:, :, here],
                ),
                p.causal,
                ctx.scale,
            )
            dq[:, :, here] += part_q
            dk[:, there] += part_k.sum(1)
            dv[:, there] += part_v.sum(1)
        return _unfold(dq, query.shape), dk.transpose(0, 1), dv.transpose(0, 1), None, None, None


def _fold(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[L, heads, d] -> view [kv_heads, heads / kv_heads, L, d]."""
    length, heads, dim = query.shape
    return query.view(length, num_kv_heads, heads // num_kv_heads, dim).permute(1, 2, 0, 3)


def _fold_kv(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[T, kv_heads, d] -> view [kv_heads, heads / kv_heads, T, d]."""
    group = query.shape[1] // key.shape[1]
    return key.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)


def _unfold(out: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[kv_heads, group, L, d] -> [L, heads, d]."""
    return out.permute(2, 0, 1, 3).reshape(shape)
