"""One rank alone is told to stop while responses are generated: all stop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from harness import run_ranks

from megatron_qlrl.errors import StopRequested
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.rollout.collect import Collector
from megatron_qlrl.rollout.vllm_engine import Sampling, VllmEngine


class FakeEngine:
    num_engines, leads = 2, True

    def __init__(self, rank: int, told: int) -> None:
        self.engine_index, self._is_told = rank, rank == told

    @contextmanager
    def awake(self, weights: Any, version: int) -> Iterator[Any]:
        yield self.generate

    def generate(self, requests: Sequence[Any], sampling: Sampling) -> Iterator[Any]:
        if self._is_told:
            raise StopRequested(f"rank {self.engine_index} was told")
        return iter(())


def _ranks_of_one_engine(rank: int, told: int) -> None:
    """Between two steps of the engine."""
    engine = VllmEngine.__new__(VllmEngine)
    engine._ranks = dist.group.WORLD
    engine._give_up = lambda: f"rank {rank} was told" if rank == told else ""
    assert engine._reason_to_stop() == f"rank {told} was told"


def _engines(rank: int, told: int) -> None:
    """When their generation has ended: the one that was not told has all its responses."""
    engine: Any = FakeEngine(rank, told)
    nobody: Any = None
    collector = Collector(
        engine=lambda: engine,
        weights=lambda: (iter(()), 0),
        decode=str,
        scorer=nobody,
        run_seed=0,
        max_masked_share=0.0,
    )
    with (
        pytest.raises(StopRequested, match=f"rank {told} was told"),
        collector.session(Sampling(1.0, 1.0, 1, 1), step=0, meter=Meter()) as collect,
    ):
        collect([])


@pytest.mark.parametrize("worker", [_ranks_of_one_engine, _engines])
def test_all_stop(worker: Any) -> None:
    run_ranks(worker, 2, [0, 1])
