"""Collectives of a single rank; several ranks are in tests/dist_cpu."""

import pytest
import torch
import torch.distributed as dist

from megatron_qlrl.errors import CheckpointError, DataError
from megatron_qlrl.parallel.collectives import GatherTokens, gather_objects, on_all_ranks

pytestmark = pytest.mark.usefixtures("lone_group")


def test_gather_of_one_rank_is_the_identity_both_ways() -> None:
    local = torch.arange(6.0).view(3, 2).t().requires_grad_()  # not contiguous
    gathered = GatherTokens.apply(local, dist.group.WORLD)
    weigh = torch.arange(6.0).view(2, 3)
    (grad,) = torch.autograd.grad((gathered * weigh).sum(), local)
    assert torch.equal(gathered, local)
    assert torch.equal(grad, weigh)


def test_objects() -> None:
    assert gather_objects({"a": 1}) == [{"a": 1}]


@pytest.mark.parametrize("kind", [DataError, CheckpointError])
def test_user_error_keeps_its_kind_and_message(kind: type[Exception]) -> None:
    def fail() -> None:
        raise kind("row 3 is empty")

    with pytest.raises(kind, match="^row 3 is empty$"):
        on_all_ranks(fail)


def test_result_is_returned() -> None:
    assert on_all_ranks(lambda: [1, 2]) == [1, 2]


def test_programming_error_is_not_dressed_up() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        on_all_ranks(fail)
