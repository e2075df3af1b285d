"""Keeps layer inputs in host memory between a forward and its backward pass."""

from contextlib import AbstractContextManager
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron_qlrl.platform.device import has_gpu


def layer_inputs_on_host(hidden_size: int) -> AbstractContextManager[None]:
    """Returns a context for a decoder that recomputes whole layers. In it, the layers' inputs
    [L, 1, hidden] that autograd keeps go to pinned host memory until their backward pass.

    What a fused final norm of the last stage keeps has the same shape and goes there, too. All else
    stays: the rotary angles are one tensor that all layers share. The copies run on the stream of
    the computation, so that they are never early or late, but the computation does not hide them.
    This has not been run on a GPU yet.
    """
    return saved_tensors_hooks(partial(_to_host, hidden_size), _to_device)


SMALLEST_BYTES = 2**20
"""Host memory is taken in whole pieces of this size."""

Kept = tuple[list[torch.Tensor], torch.Size, torch.device]
"""The parts of a flattened tensor in host memory, its shape and its device."""


def pieces(num_bytes: int) -> list[int]:
    """Returns sizes that add up to `num_bytes`, or to less than SMALLEST_BYTES more. Each is a
    power of two, because torch rounds what it pins up to one: 620 MiB would take 1 GiB."""
    units = -(-num_bytes // SMALLEST_BYTES)
    powers = [1 << bit for bit in reversed(range(units.bit_length())) if units >> bit & 1]
    return [power * SMALLEST_BYTES for power in powers]


def _to_host(hidden_size: int, tensor: torch.Tensor) -> torch.Tensor | Kept:
    if tensor.dim() != 3 or tensor.shape[-1] != hidden_size:
        return tensor
    flat, parts, start = tensor.reshape(-1), [], 0
    for size in pieces(tensor.nbytes):
        host = torch.empty(size // tensor.itemsize, dtype=tensor.dtype, pin_memory=has_gpu())
        host = host[: flat.numel() - start]
        parts.append(host.copy_(flat[start : start + host.numel()], non_blocking=True))
        start += host.numel()
    return parts, tensor.shape, tensor.device


def _to_device(kept: torch.Tensor | Kept) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    parts, shape, device = kept
    tensor = torch.empty(shape, dtype=parts[0].dtype, device=device)
    start, flat = 0, tensor.view(-1)
    for part in parts:
        flat[start : start + part.numel()].copy_(part, non_blocking=True)
        start += part.numel()
    return tensor
