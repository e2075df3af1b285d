"""How the sums of micro-batches become the metrics of a step. (The step itself runs in
tests/dist_cpu, against transformers.)"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_qlrl.config.schema import OptimizerConfig
from megatron_qlrl.errors import DataError
from megatron_qlrl.packing.rows import build_row, empty_row
from megatron_qlrl.policy.policy import Policy, token_means
from megatron_qlrl.types import PackedRow, TrainGroup, TrainResponse

pytestmark = pytest.mark.usefixtures("lone_group")


def context(*, last_stage: bool = True, tp_rank: int = 0) -> Any:
    return SimpleNamespace(is_last_stage=last_stage, tp=SimpleNamespace(rank=tp_rank))


FOUND = [
    {
        "num_tokens": torch.tensor(3),
        "actor/pg_loss": torch.tensor(-0.5),
        "actor/entropy": torch.tensor(6.0),
        "training/rollout_logprobs_diff_max": torch.tensor(0.25),
    },
    {
        "num_tokens": torch.tensor(1),
        "actor/pg_loss": torch.tensor(0.125),
        "actor/entropy": torch.tensor(1.0),
        "training/rollout_logprobs_diff_max": torch.tensor(0.5),
    },
    {"num_tokens": torch.tensor(0), "actor/pg_loss": torch.tensor(0.0)},  # an empty row
]


def test_means_are_per_token_the_loss_is_a_sum_and_maxima_stay_maxima() -> None:
    assert token_means(FOUND, context()) == {
        "actor/pg_loss": -0.375,
        "actor/entropy": 7 / 4,
        "training/rollout_logprobs_diff_max": 0.5,
    }


@pytest.mark.parametrize("place", [{"last_stage": False}, {"tp_rank": 1}])
def test_only_one_copy_counts(place: dict[str, Any]) -> None:
    assert token_means(FOUND, context(**place)) == {}


def test_step_without_any_token_divides_by_nothing() -> None:
    empty = {"num_tokens": torch.tensor(0), "actor/entropy": torch.tensor(0.0)}
    assert token_means([empty], context()) == {"actor/entropy": 0.0}


class Recorder:
    """An optimizer and data-parallel wrapper that only write down what they are told."""

    def __init__(self) -> None:
        self.param_groups = [{"lr": 1.0, "eps": 1.0}]
        self.chained_optimizers: list[Any] = []
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call() -> float:
            self.calls.append(name)
            return 1.0

        return call


class FakePolicy(Policy):
    def __init__(self, recorder: Any, *, offload: bool) -> None:
        self.optimizer = self.ddp_model = recorder
        self.context = context()
        self.model: Any = torch.nn.Module()
        self.version = 0
        self._optimizer_config = OptimizerConfig.model_validate({"offload": offload, "eps": 1e-3})

    def run(self, *_: Any, **__: Any) -> list[Any]:
        return [self.ddp_model.forward_backward() and FOUND[0]]


def row_of(*responses: int) -> PackedRow:
    """A row of one prompt token and responses of these lengths."""
    group = TrainGroup(
        np.zeros(1, np.int32),
        tuple(TrainResponse(np.zeros(n, np.int32), 1.0) for n in responses),
    )
    weights = {"loss_weights": [[1.0] * len(responses)]}
    return build_row([group], [(0, tuple(range(len(responses))))], weights)


def test_logprobs_fill_only_what_a_column_lacks() -> None:
    """Groups that waited keep the log-probs of the weights that sampled them."""
    policy = FakePolicy(Recorder(), offload=False)
    lone: Any = SimpleNamespace(group=None)
    policy.context = SimpleNamespace(cp=lone, pp=lone)  # pyright: ignore
    policy.run = lambda *_, **__: [  # pyright: ignore
        {"slots": torch.tensor([1, 0]), "logprobs": torch.tensor([-2.0, -1.0])},
        {"slots": torch.tensor([0]), "logprobs": torch.tensor([-3.0])},
    ]
    rows = [row_of(1, 1), row_of(1)]
    kept = np.array([np.nan, -0.5], np.float32)
    rows[0] = replace(rows[0], columns={**rows[0].columns, "old_logprobs": kept})

    filled = policy.add_logprobs(rows, "old_logprobs")
    assert [row.columns["old_logprobs"].tolist() for row in filled] == [[-1.0, -0.5], [-3.0]]
    assert all(row.columns["old_logprobs"].dtype == np.float32 for row in filled)
    assert np.isnan(kept[0])
    others = policy.add_logprobs(rows, "ref_logprobs")
    assert [row.columns["ref_logprobs"].tolist() for row in others] == [[-1.0, -2.0], [-3.0]]
    assert others[0].columns["old_logprobs"] is kept


UPDATE = ["train", "restore_grad_buffers", "zero_grad_buffer", "zero_grad", "forward_backward"]


@pytest.mark.parametrize("allowed", [True, False])
def test_optimizer_is_on_the_device_from_its_gradients_to_its_step(allowed: bool) -> None:
    step = ["step_with_ready_grads"] if allowed else []
    for offload in (True, False):
        recorder = Recorder()
        policy = FakePolicy(recorder, offload=offload)
        policy.update([], lambda *_: None, lr=0.5, permit=lambda _: allowed)  # pyright: ignore
        work = ["prepare_grads", "get_grad_norm", *step]
        if offload:
            work = ["restore_from_cpu", *work, "offload_to_cpu"]
        assert recorder.calls == UPDATE + work
        assert policy.version == len(step)
        (group,) = recorder.param_groups
        assert (group["lr"], group["eps"]) == ((0.5, 1e-3) if allowed else (1.0, 1.0))


@pytest.mark.parametrize("wrong", [-1, 157, 160])
def test_a_token_that_the_model_does_not_have_is_refused(wrong: int) -> None:
    """Its log-prob would be a wrong number: 157 to 159 are rows of padding."""
    policy = Policy.__new__(Policy)
    policy.model_shape = SimpleNamespace(vocab_size=157)  # pyright: ignore
    row = replace(empty_row(), token_ids=np.array([0, 156, wrong], np.int32))
    with pytest.raises(DataError, match=f"token id {wrong} is outside .* of 157; the tokenizer"):
        policy.run([empty_row(), row], None, forward_only=True)
