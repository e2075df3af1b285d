"""How the sums of micro-batches become the metrics of a step. (The step itself runs in
tests/dist_cpu, against transformers.)"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_qlrl.policy.step import _means

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
    assert _means(FOUND, context()) == {
        "actor/pg_loss": -0.375,
        "actor/entropy": 7 / 4,
        "training/rollout_logprobs_diff_max": 0.5,
    }


@pytest.mark.parametrize("place", [{"last_stage": False}, {"tp_rank": 1}])
def test_only_one_copy_counts(place: dict[str, Any]) -> None:
    assert _means(FOUND, context(**place)) == {}


def test_step_without_any_token_divides_by_nothing() -> None:
    empty = {"num_tokens": torch.tensor(0), "actor/entropy": torch.tensor(0.0)}
    assert _means([empty], context()) == {"actor/entropy": 0.0}
