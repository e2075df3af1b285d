"""The least that an update can take here: its FLOPs at the rates of one large matrix product and of
the attention kernel alone, which are measured in the same process."""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from megatron_qlrl.bench.measure import measure
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.plan.flops import (
    UPDATE_TO_FORWARD,
    attention_flops,
    block_flops,
    block_pairs,
    pairs,
)
from megatron_qlrl.platform.device import device, has_gpu
from megatron_qlrl.platform.machine import attention_kernel
from megatron_qlrl.policy.kernels import KERNELS


def update_floor(
    shape: ModelShape, *, prompt: int, responses: list[int], dtype: torch.dtype, rounds: int
) -> dict[str, float]:
    """Returns FLOPs of an update on one group with a shared prompt, the rates in FLOP/s, and the
    seconds that the FLOPs take at these rates.

    The kernel's rate is that of the prompt's attention on itself, forward and backward, in model
    FLOPs: what a backward pass recomputes inside the kernel counts as its slowness.
    """
    matmul, kernel = matmul_rate(dtype, rounds), _attention_rate(shape, prompt, dtype, rounds)
    flops = UPDATE_TO_FORWARD * block_flops(shape, prompt, responses)
    in_a_layer = attention_flops(shape, block_pairs(prompt, responses))
    attention = UPDATE_TO_FORWARD * shape.num_layers * in_a_layer
    return {
        "flops": flops,
        "attention_flops": attention,
        "matmul_flops_per_s": matmul,
        "attention_flops_per_s": kernel,
        "seconds": (flops - attention) / matmul + attention / kernel,
    }


def matmul_rate(dtype: torch.dtype, rounds: int) -> float:
    """Returns the FLOP/s of one large square matrix product."""
    size = 8192 if has_gpu() else 1536
    left, right = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right, rounds)


def _attention_rate(shape: ModelShape, tokens: int, dtype: torch.dtype, rounds: int) -> float:
    kernel = KERNELS[attention_kernel(gpu=has_gpu()).name]
    make = partial(torch.randn, device=device(), dtype=dtype)
    q = make(tokens, shape.num_heads, shape.head_dim)
    k, v = (make(tokens, shape.num_kv_heads, shape.head_dim) for _ in range(2))
    scale = shape.head_dim**-0.5

    def both() -> None:
        out, lse = kernel.forward(q, k, v, True, scale)
        kernel.backward(out, q, k, v, out, lse, True, scale)

    return UPDATE_TO_FORWARD * attention_flops(shape, pairs(tokens)) / _seconds(both, rounds)


def _seconds(call: Callable[[], Any], rounds: int) -> float:
    measure(call)  # warm-up
    return median(measure(call).work_s for _ in range(rounds))
