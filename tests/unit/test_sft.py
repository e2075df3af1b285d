"""SFT: the order of the examples and the steps of a run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_qlrl.config.schema import StabilityConfig
from megatron_qlrl.metrics.monitor import Monitor
from megatron_qlrl.sft import as_group, batch_indices, num_sft_steps, run_sft_steps
from megatron_qlrl.types import Example, PackedRow, Prompt, StepReport, TrainGroup


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


def run(first_step: int) -> tuple[list[StepReport], list[Any]]:
    calls: list[Any] = []

    def pack(groups: Sequence[TrainGroup]) -> list[PackedRow]:
        calls.append([int(g.prompt_ids[0]) for g in groups])
        return []

    def update(rows: Sequence[PackedRow], number: int) -> dict[str, float]:
        calls.append(number)
        return {"sft/nll": number / 2}

    reports = run_sft_steps(
        [example(i) for i in range(5)],
        first_step=first_step,
        num_steps=5,
        batch_size=3,
        seed=9,
        pack=pack,
        update=update,
        monitor=Monitor(StabilityConfig.model_validate({}), warn=print),
    )
    return list(reports), calls


def test_steps_train_on_their_batch_and_report() -> None:
    reports, calls = run(0)
    assert [r.step for r in reports] == calls[1::2] == [0, 1, 2, 3, 4]
    batches = calls[::2]
    assert [len(b) for b in batches] == [3, 2, 3, 2, 3]
    assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == [0, 1, 2, 3, 4]
    assert [r.metrics["sft/nll"] for r in reports] == [0, 0.5, 1, 1.5, 2]
    assert [r.metrics["batch/examples"] for r in reports] == [3, 2, 3, 2, 3]
    for report, num in zip(reports, (3, 2, 3, 2, 3), strict=True):
        tokens = report.metrics["perf/throughput"] * report.metrics["timing_s/step"]
        assert tokens == pytest.approx(5 * num)
        assert report.metrics["perf/total_num_tokens"] == 5 * num


def test_resumed_run_sees_the_same_batches() -> None:
    _, whole = run(0)
    reports, rest = run(3)
    assert rest == whole[6:]
    assert [r.step for r in reports] == [3, 4]
