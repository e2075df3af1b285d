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
from megatron_qlrl.platform.device import has_gpu
from megatron_qlrl.platform.machine import attention_kernel
from megatron_qlrl.policy.kernels import KERNELS, Kernel
from megatron_qlrl.types import Piece


@dataclass
class AttentionPlan(PackedSeqParams):
    """Carries what the core attention needs to know of a micro-batch.

    It travels through Megatron's layers in the `packed_seq_params` argument, the one that
    every layer hands on untouched (also under activation recomputation); `qkv_format` must
    not say "thd", or Megatron would interpret the fields.
    """

    pieces: tuple[Piece, ...] = ()
    kv_index: torch.Tensor | None = None


class SegmentAttention(MegatronModule):
    """Takes the place of Megatron's core attention; it has no parameters."""

    def __init__(
        self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.cp_group = pg_collection.cp
        self.kernel = KERNELS[attention_kernel(gpu=has_gpu()).name]

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
    kernel: Kernel = KERNELS["aten_cpu"],
) -> torch.Tensor:
    """Computes attention of [L, heads, d] on [T, kv_heads, d] by `pieces` -> [L, heads, d].

    Queries that no piece mentions (padding) get zeros. heads must be a multiple of kv_heads.
    """
    return _SegmentAttention.apply(query, key, value, pieces, scale, kernel)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pieces: tuple[Piece, ...],
        scale: float,
        kernel: Kernel,
    ) -> torch.Tensor:
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        # [L, heads] as `out`, and at least float32: the pieces are weighted by it.
        lse_type = torch.promote_types(query.dtype, torch.float32)
        lse = torch.full(query.shape[:2], -torch.inf, dtype=lse_type, device=query.device)
        for p in pieces:
            here, there = slice(p.q0, p.q1), slice(p.k0, p.k1)
            part, part_lse = kernel.forward(query[here], key[there], value[there], p.causal, scale)
            merged = torch.logaddexp(lse[here], part_lse)
            old_share = torch.exp(lse[here] - merged).unsqueeze(-1)
            new_share = torch.exp(part_lse - merged).unsqueeze(-1)
            out[here] = (out[here] * old_share + part * new_share).to(out.dtype)
            lse[here] = merged
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.pieces, ctx.scale, ctx.kernel = pieces, scale, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad_out = grads[0].contiguous()
        dq, dk, dv = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
        for p in ctx.pieces:
            here, there = slice(p.q0, p.q1), slice(p.k0, p.k1)
            part_q, part_k, part_v = ctx.kernel.backward(
                grad_out[here], query[here], key[there], value[there], out[here], lse[here],
                p.causal, ctx.scale,
            )  # fmt: skip
            dq[here] += part_q
            dk[there] += part_k
            dv[there] += part_v
        return dq, dk, dv, None, None, None
