"""Collectives across ranks: the gather's gradient, and errors that reach every rank."""

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from megatron_qlrl.errors import DataError
from megatron_qlrl.parallel.collectives import GatherTokens, gather_objects, on_all_ranks


def check_gather(rank: int, _: None) -> None:
    world = dist.group.WORLD
    local = (torch.arange(4.0).view(2, 2) + 10 * rank).requires_grad_()
    gathered = GatherTokens.apply(local, world)
    want = [[0.0, 1.0], [2.0, 3.0], [10.0, 11.0], [12.0, 13.0]]
    assert gathered.tolist() == want
    # Rank 0 weighs the rows 1 2 3 4, rank 1 ten times that: each gets the sum of its rows'.
    weigh = torch.tensor([1.0, 2.0, 3.0, 4.0]) * (10 if rank else 1)
    (gathered * weigh[:, None]).sum().backward()
    assert local.grad is not None
    assert local.grad[:, 0].tolist() == ([33.0, 44.0] if rank else [11.0, 22.0])
    assert gather_objects(("rank", rank)) == [("rank", 0), ("rank", 1)]


def check_errors(rank: int, _: None) -> None:
    def fails_on_one() -> str:
        if rank == 1:
            raise DataError("row 7 is empty")
        return "fine"

    with pytest.raises(DataError, match="^rank 1: row 7 is empty$"):
        on_all_ranks(fails_on_one)

    def fails_on_all() -> None:
        raise DataError("no such file")

    with pytest.raises(DataError, match="^no such file$"):
        on_all_ranks(fails_on_all)
    assert on_all_ranks(lambda: rank + 1) == rank + 1


def check(rank: int, case: str) -> None:
    {"gather": check_gather, "errors": check_errors}[case](rank, None)


def test_two_ranks() -> None:
    run_ranks(check, 2, ["gather", "errors"])
