"""What `qlrl bench rollout` forces on an engine and makes of its times."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from megatron_qlrl.bench.rollout import ForcedEngine, Spent, Work, summarise
from megatron_qlrl.rollout.seeds import token_seed
from megatron_qlrl.rollout.vllm_engine import Completion, Request, Sampling
from megatron_qlrl.types import Prompt


class FakeEngine:
    """Every response has as many tokens as it may have."""

    num_engines, engine_index, leads = 2, 1, True

    @contextmanager
    def awake(self, weights: Iterable[Any], version: int) -> Iterator[Any]:
        yield self.generate

    def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        assert sampling.ignore_end
        for number, request in enumerate(requests):
            assert request.max_tokens is not None
            ids = np.zeros(request.max_tokens, np.int32)
            yield number, Completion(ids, np.zeros(len(ids), np.float32), False)

    def take_counts(self) -> dict[str, float]:
        return {"prefill_tokens": 7.0}


def test_responses_end_at_their_lengths_over_all_rounds() -> None:
    prompt = Prompt("bench:0", np.arange(5, dtype=np.int32), "", "", "")
    work = Work(1, [prompt], {("bench:0", 0): 3, ("bench:0", 1): 9})
    engine = ForcedEngine(FakeEngine(), work, group_size=2)  # pyright: ignore[reportArgumentType]
    sampling = Sampling(1.0, 1.0, 20, 2)

    def ask(step: int, sample: int, so_far: int, budget: int) -> tuple[int, bool]:
        engine.begin(step, run_seed=4)
        ids = np.zeros(5 + so_far, np.int32)
        request = Request(ids, token_seed(4, step, "bench:0", sample), budget)
        with engine.awake([], 0) as generate:
            ((_, completion),) = generate([request], sampling)
        return len(completion.token_ids), completion.finished

    assert ask(0, 0, 0, 4) == (3, True)
    assert ask(0, 1, 0, 4) == (4, False)
    assert ask(1, 1, 4, 4) == (4, False)
    assert ask(2, 1, 8, 4) == (1, True)
    engine.take_counts()
    assert engine.spent.prompt_tokens_read == 7
    assert engine.spent.responses == [1] * 4
    assert len(engine.spent.calls) == len(engine.spent.busy) == 4


def test_every_call_lasts_as_long_as_its_slowest_engine() -> None:
    # Two calls of 4 and 6 seconds: 10 in all, of which the engines work 4 + 3 and 2 + 6.
    one = Spent([4.0, 3.0], [6.0, 3.0], [2, 1], 10.0, 50, 2.0)
    other = Spent([2.0, 6.0], [2.0, 9.0], [1, 2], 5.0, 50, 2.0)
    got = summarise([one, other])
    # Slots: 2 * 4 + 1 * 6 and 1 * 4 + 2 * 6, 30 seconds, of which 20 were in use.
    assert got["idle_share"] == pytest.approx(1 / 3)
    assert got["engine_idle_share"] == pytest.approx(1 - 15 / 20)
    assert got["tokens_per_s"] == 5
    assert (got["tokens"], got["seconds"], got["prompt_tokens_read"]) == (50, 10, 15)
