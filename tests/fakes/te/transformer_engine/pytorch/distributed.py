"""Tensor parallel collectives with their backward passes, recomputation, and the random state."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from .fp8 import FP8GlobalStateManager, fp8_autocast

Collective = Callable[[torch.Tensor, Any], torch.Tensor]


def same(x: torch.Tensor, group: Any) -> torch.Tensor:
    return x.view_as(x)


def all_gather(x: torch.Tensor, group: Any) -> torch.Tensor:
    whole = x.new_empty(len(x) * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def all_reduce(x: torch.Tensor, group: Any) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def reduce_scatter(x: torch.Tensor, group: Any) -> torch.Tensor:
    return all_reduce(x, group).chunk(group.size())[group.rank()].contiguous()


class Move(torch.autograd.Function):
    """`there` in the forward pass, `back` in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: Any, there: Collective, back: Collective
    ) -> torch.Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return ctx.back(grads[0], ctx.group), None, None, None


def set_tensor_model_parallel_attributes(tensor: Any, dim: int) -> None:
    """The marks by which Megatron knows a shard; refused on a tensor that has them."""
    marks = {"tensor_model_parallel": True, "partition_dim": dim, "partition_stride": 1}
    for name, value in marks.items():
        assert not hasattr(tensor, name), name
        setattr(tensor, name, value)


def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> Any:
    return nullcontext()


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Any = None,
    tp_group: Any = None,
    **kwargs: Any,
) -> Any:
    """Recomputes under the recipe of the forward pass."""
    recipe, group = FP8GlobalStateManager.recipe, FP8GlobalStateManager.group

    def run(*inputs: Any) -> Any:
        with fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe, fp8_group=group):
            return function(*inputs, **kwargs)

    return torch_checkpoint(run, *args, use_reentrant=True)


class CudaRNGStatesTracker:
    pass
