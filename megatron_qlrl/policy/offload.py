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


Kept = tuple[torch.Tensor, torch.device]


def _to_host(hidden_size: int, tensor: torch.Tensor) -> Kept:
    if tensor.dim() != 3 or tensor.shape[-1] != hidden_size:
        return tensor, tensor.device
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=has_gpu())
    return host.copy_(tensor, non_blocking=True), tensor.device


def _to_device(kept: Kept) -> torch.Tensor:
    tensor, device = kept
    return tensor.to(device, non_blocking=True)
