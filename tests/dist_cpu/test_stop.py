"""One rank alone is told to stop while responses are generated: all stop."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from harness import run_ranks

from megatron_qlrl.compose.rollouts import Rollouts
from megatron_qlrl.errors import StopRequested
from megatron_qlrl.rollout.vllm_engine import VllmEngine


class FakeEngine:
    @contextmanager
    def awake(self, weights: Any) -> Iterator[None]:
        yield None


def _ranks_of_one_engine(rank: int, told: int) -> None:
    """Between two steps of the engine."""
    engine = VllmEngine.__new__(VllmEngine)
    engine._ranks = dist.group.WORLD
    engine._give_up = lambda: f"rank {rank} was told" if rank == told else ""
    assert engine._reason_to_stop() == f"rank {told} was told"


def _engines(rank: int, told: int) -> None:
    """When their generation has ended: the one that was not told has all its responses."""
    rollouts = Rollouts.__new__(Rollouts)
    vars(rollouts)["_engine"] = FakeEngine()

    def sample(**_: Any) -> list[Any]:
        if rank == told:
            raise StopRequested(f"rank {rank} was told")
        return []

    stream: Any = None  # nothing takes the weights
    with pytest.raises(StopRequested, match=f"rank {told} was told"):
        rollouts._sampled(sample, stream, 0)
    assert rollouts._sampled(lambda **_: [], stream, 0) == []


@pytest.mark.parametrize("worker", [_ranks_of_one_engine, _engines])
def test_all_stop(worker: Any) -> None:
    run_ranks(worker, 2, [0, 1])
