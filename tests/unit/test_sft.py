"""SFT: the order of the examples and the steps of a run."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from fake_policy import FakePolicy, make_trainer
from hypothesis import given
from hypothesis import strategies as st

from megatron_qlrl.config.schema import StabilityConfig
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.metrics.monitor import Monitor
from megatron_qlrl.sft import as_group, batch_indices, num_sft_steps, train_sft
from megatron_qlrl.train.phases import Phase
from megatron_qlrl.types import Example, PackedRow, Prompt


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "limit", "want"),
    [
        (10, 4, 1, None, 3),
        (10, 4, 3, None, 9),
        (8, 4, 3, None, 6),
        (10, 4, 3, 5, 5),
        (10, 4, 1, 99, 3),
        (3, 128, 2, None, 2),
    ],
)
def test_number_of_steps(
    examples: int, batch: int, epochs: int, limit: int | None, want: int
) -> None:
    assert num_sft_steps(examples, batch_size=batch, epochs=epochs, max_steps=limit) == want


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_holds_every_example_once(num: int, batch: int, seed: int, epoch: int) -> None:
    per_epoch = num_sft_steps(num, batch_size=batch, epochs=1, max_steps=None)
    steps = [
        batch_indices(num, batch_size=batch, step=epoch * per_epoch + i, seed=seed)
        for i in range(per_epoch)
    ]
    assert all(len(step) == batch for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= batch
    assert sorted(np.concatenate(steps).tolist()) == list(range(num))


def test_order_differs_by_epoch_and_seed_and_is_repeatable() -> None:
    def order(step: int, seed: int) -> list[int]:
        return batch_indices(50, batch_size=50, step=step, seed=seed).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(1, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != list(range(50))


def example(number: int) -> Example:
    """Prompt of 2 tokens, response of 3, all of them the example's number."""
    ids = np.full(2, number, np.int32)
    return Example(Prompt(str(number), ids, "sft", "?", "!"), np.full(3, number, np.int32))


def test_an_example_is_a_group_of_one_with_advantage_one() -> None:
    group = as_group(example(7))
    assert group.prompt_ids.tolist() == [7, 7]
    (response,) = group.responses
    assert response.token_ids.tolist() == [7, 7, 7]
    assert response.advantage == 1.0
    assert response.engine_logprobs is None


class FakeRun:
    """The recorder of a run of 5 steps."""

    def __init__(self) -> None:
        self.monitor = Monitor(StabilityConfig.model_validate({}), warn=print)
        self.recorded: list[tuple[int, dict[str, float], int]] = []
        self.decided: list[int] = []

    @property
    def recorder(self) -> "FakeRun":
        return self

    def steps(self, phases: Sequence[Phase], first_step: int) -> Iterator[tuple[Phase, int]]:
        (phase,) = phases
        return ((phase, step) for step in range(first_step, phase.end_step))

    def record(
        self, step: int, meter: Meter, groups: Any, *, num_tokens: int, trainer: Any, data: Any
    ) -> None:
        assert groups == [] and data is None
        self.recorded.append((step, meter.summary(), num_tokens))

    def decide(self, phase: Phase, step: int) -> None:
        self.decided.append(step)


def run(first_step: int) -> tuple[FakeRun, FakePolicy]:
    fake: Any = FakeRun()
    policy = FakePolicy()
    train_sft(
        fake,
        make_trainer(policy),
        [example(i) for i in range(5)],
        Phase(0, "sft", 0, 5),
        first_step=first_step,
        batch_size=3,
        seed=9,
    )
    return fake, policy


def examples_in(row: PackedRow) -> list[int]:
    return sorted(int(row.token_ids[block.prompt[0]]) for block in row.blocks)


def test_steps_train_on_their_batch_and_are_recorded() -> None:
    fake, policy = run(0)
    assert fake.decided == [step for step, *_ in fake.recorded] == [0, 1, 2, 3, 4]
    batches = [examples_in(row) for row in policy.trained]
    assert [len(b) for b in batches] == [3, 2, 3, 2, 3]
    assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == [0, 1, 2, 3, 4]
    for number, (_, metrics, num_tokens) in enumerate(fake.recorded):
        assert metrics["actor/pg_loss"] == number
        assert metrics["batch/examples"] == len(batches[number])
        assert num_tokens == 5 * len(batches[number])


def test_resumed_run_sees_the_same_batches() -> None:
    _, whole = run(0)
    fake, rest = run(3)
    assert [examples_in(r) for r in rest.trained] == [examples_in(r) for r in whole.trained[3:]]
    assert fake.decided == [3, 4]
