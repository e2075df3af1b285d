"""Named collectives over torch process groups."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_qlrl import errors
from megatron_qlrl.errors import QlrlError

K = TypeVar("K")
T = TypeVar("T")


class GatherTokens(torch.autograd.Function):
    """All-gather along dim 0; backward reduce-scatters the gradient.

    Own function because torch.distributed.nn's all_gather fails in backward on gloo
    sub-groups ("Global rank 1 is not part of group").
    """

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """local [L, ...] -> [size * L, ...]; L must be the same on every rank."""
        ctx.group = group
        size = dist.get_world_size(group)
        gathered = local.new_empty(size * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        size = dist.get_world_size(ctx.group)
        local = grad.new_empty(grad.shape[0] // size, *grad.shape[1:])
        dist.reduce_scatter_tensor(local, grad.contiguous(), group=ctx.group)
        return local, None


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the values of all ranks of `group` (by default all ranks), in rank order, on each of
    them. They travel as pickles, which is safe between ranks of one job. A thread beside the main
    one needs a group of its own.
    """
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_dicts(value: Mapping[K, T], group: dist.ProcessGroup | None = None) -> dict[K, T]:
    """Returns the entries of all ranks in one dict; for a key that several have, the last
    rank's."""
    return {key: entry for part in gather_objects(value, group) for key, entry in part.items()}


def on_all_ranks(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs `work` on this rank. If it fails on any rank with a user's error, every rank raises the
    error of the first such rank.

    Use it around everything that can fail on one rank alone (reading, writing, scoring):
    a rank that went on would wait for ever in its next collective.
    """
    error: QlrlError | None = None
    result: Any = None
    try:
        result = work()
    except QlrlError as caught:
        error = caught
    failures = [
        (rank, name, message)
        for rank, failure in enumerate(gather_objects(_describe(error), group))
        if failure is not None
        for name, message in [failure]
    ]
    if failures:
        rank, name, message = failures[0]
        kind = getattr(errors, name)
        same = len({m for _, _, m in failures}) == 1 and len(failures) == dist.get_world_size()
        raise kind(message if same else f"rank {rank}: {message}") from error
    return result


def _describe(error: QlrlError | None) -> tuple[str, str] | None:
    return None if error is None else (type(error).__name__, str(error))
