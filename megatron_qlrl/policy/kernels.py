"""Attention kernels behind one small interface: the output and log-sum-exp of one piece, and its
share of the gradient, given the log-sum-exp of ALL pieces of the same queries.

No kernel takes a mask: a piece is a rectangle, or a causal square.
"""

from typing import Any, Protocol

import torch

from megatron_qlrl.platform.device import strictly_deterministic

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Kernel(Protocol):
    """query [L, heads, d], key and value [T, kv_heads, d]; causal only with L = T."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (out [L, heads, d], log-sum-exp of the scaled scores, float32 or wider [L,
        heads])."""
        ...

    def backward(
        self, grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        """Returns the gradients of q, k and v; `out` and `lse` are those after the merge."""
        ...


class _Aten:
    """torch's own flash kernels. Heads are folded as batch = kv head, head = query head of its
    group, so that grouped keys and values are shared by a stride of 0 instead of copied."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = k.shape[1]
        out, lse = self._forward((_fold(q, heads), _fold_kv(k, q), _fold_kv(v, q)), causal, scale)
        return out.permute(2, 0, 1, 3).reshape(q.shape), lse.flatten(0, 1).t()

    def backward(
        self, grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        heads = k.shape[1]
        dq, dk, dv = self._backward(
            (
                _fold(grad_out, heads), _fold(q, heads), _fold_kv(k, q), _fold_kv(v, q),
                _fold(out, heads), lse.t().unflatten(0, (heads, -1)).contiguous(),
            ),
            causal,
            scale,
        )  # fmt: skip
        return (
            dq.permute(2, 0, 1, 3).reshape(q.shape),
            dk.sum(1).transpose(0, 1),
            dv.sum(1).transpose(0, 1),
        )

    def _forward(self, qkv: Grads, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def _backward(self, tensors: tuple[torch.Tensor, ...], causal: bool, scale: float) -> Grads:
        raise NotImplementedError


class AtenCpu(_Aten):
    """float32, float64 and bfloat16 on a CPU."""

    def _forward(self, qkv: Grads, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *qkv, 0.0, causal, scale=scale
        )

    def _backward(self, tensors: tuple[torch.Tensor, ...], causal: bool, scale: float) -> Grads:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, 0.0, causal, scale=scale
        )


class AtenCuda(_Aten):
    """float16 and bfloat16 on a GPU, without any other package."""

    def _forward(self, qkv: Grads, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        out_lse = torch.ops.aten._scaled_dot_product_flash_attention(*qkv, 0.0, causal, scale=scale)
        return out_lse[0], out_lse[1]

    def _backward(self, tensors: tuple[torch.Tensor, ...], causal: bool, scale: float) -> Grads:
        q, k = tensors[1], tensors[2]
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        with strictly_deterministic():
            return torch.ops.aten._scaled_dot_product_flash_attention_backward(
                *tensors, None, None, q.shape[2], k.shape[2], 0.0, causal, no_dropout[0],
                no_dropout[1], scale=scale,
            )  # fmt: skip


class FlashAttn:
    """The flash-attn package (2.x), which shares grouped keys inside the kernel: the gradients of
    keys and values are not made once for every query head. Not run on a GPU yet."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _flash_attn()._flash_attn_forward(
            q[None], k[None], v[None], dropout_p=0.0, softmax_scale=scale, causal=causal,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
            return_softmax=False,
        )[:2]  # fmt: skip
        return out[0], lse[0].t()

    def backward(
        self, grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        dq, dk, dv = (torch.empty_like(x[None]) for x in (q, k, v))
        _flash_attn()._flash_attn_backward(
            grad_out[None], q[None], k[None], v[None], out[None], lse.t().contiguous()[None],
            dq, dk, dv, dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1,
            window_size_right=-1, softcap=0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq[0], dk[0], dv[0]


KERNELS: dict[str, Kernel] = {
    "aten_cpu": AtenCpu(),
    "aten_cuda": AtenCuda(),
    "flash_attn": FlashAttn(),
}
"""The kernels by the names that `platform.machine.attention_kernel` chooses from."""


def _flash_attn() -> Any:
    from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]

    return flash_attn_interface


def _fold(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[L, heads, d] -> view [kv_heads, heads / kv_heads, L, d]."""
    length, heads, dim = query.shape
    return query.view(length, num_kv_heads, heads // num_kv_heads, dim).permute(1, 2, 0, 3)


def _fold_kv(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[T, kv_heads, d] -> view [kv_heads, heads / kv_heads, T, d]."""
    group = query.shape[1] // key.shape[1]
    return key.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
