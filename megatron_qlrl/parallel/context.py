"""Process groups: tensor, pipeline, context, data and expert parallel. The only reader of
Megatron's global state; everything else gets a `ParallelContext`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed.rendezvous import rendezvous

from megatron_qlrl.platform.device import backend, has_gpu
from megatron_qlrl.platform.env import take_listener
from megatron_qlrl.platform.megatron_cpu import megatron_device

JOIN_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for the last one to join."""
TIMEOUT = timedelta(hours=4)
"""The limit of a collective. Ranks may wait long for one with longer responses; the watchdog ends a
step that hangs."""


@dataclass(frozen=True)
class Axis:
    """One parallel dimension: its size, this rank's place and the process group."""

    size: int
    rank: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place in the layout. `dp` does not count context parallel ranks, which share
    rows. `ep` are the ranks of a pipeline stage that divide the experts among themselves: first
    tensor, then context, then data parallel neighbours. An expert is never cut."""

    tp: Axis
    pp: Axis
    cp: Axis
    dp: Axis
    ep: Axis
    rank: int
    world_size: int

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1

    @property
    def experts_span_rows(self) -> bool:
        """Whether the experts are divided among ranks with different rows, which then exchange
        tokens in every micro-batch."""
        return self.ep.size > self.tp.size * self.cp.size


@contextmanager
def process_group(
    *, rank: int, local_rank: int, world_size: int, init_method: str = "env://"
) -> Iterator[None]:
    """Joins the job's process group (by default at MASTER_ADDR) and leaves it at the end."""
    if has_gpu():
        torch.cuda.set_device(local_rank)
    listener = take_listener() if init_method == "env://" else None
    if listener is None:
        store, _, _ = next(rendezvous(init_method, rank, world_size, timeout=JOIN_TIMEOUT))
    else:
        host, port, descriptor = listener
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            host, port, world_size, True, JOIN_TIMEOUT, master_listen_fd=descriptor
        )
    dist.init_process_group(
        backend(), store=store, rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():  # the rollout engine destroys it too when it closes
            dist.destroy_process_group()


def init_parallel(*, tp: int, pp: int, cp: int, seed: int, ep: int = 1) -> ParallelContext:
    """Makes Megatron's groups, once for each process group: they are global, and every gloo
    group keeps threads until the process group is destroyed (dozens of layouts in one process
    group end in thousands of threads)."""
    assert not parallel_state.is_initialized(), "parallel groups exist already"
    with megatron_device():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=int(TIMEOUT.total_seconds() / 60),
        )
        # Attention fails with "cuda rng state ... is not added" without it, dropout or not.
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ParallelContext(
        tp=_axis(parallel_state.get_tensor_model_parallel_group()),
        pp=_axis(parallel_state.get_pipeline_model_parallel_group()),
        cp=_axis(parallel_state.get_context_parallel_group()),
        dp=_axis(parallel_state.get_data_parallel_group()),
        ep=_axis(parallel_state.get_expert_model_parallel_group()),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )


def _axis(group: Any) -> Axis:
    return Axis(dist.get_world_size(group), dist.get_rank(group), group)
