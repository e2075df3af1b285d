"""Gradients that are summed during the last backward pass are those that are summed after it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from harness import rows_of, run_ranks, tiny_hf
from megatron.core.distributed import DistributedDataParallelConfig
from test_policy_parity import LOSS, groups_of, make_policy

from megatron_qlrl.policy import optimizer as policy_optimizer
from megatron_qlrl.policy.policy import Policy
from megatron_qlrl.weights.checkpoint import CheckpointStore, load_checkpoint

SMALL_BUCKETS = partial(DistributedDataParallelConfig, bucket_size=2_000)
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]


def finalized(policy: Policy, seen: list[int]) -> Callable[..., None]:
    """Counts the buckets whose sum is under way when Megatron begins to finish the gradients."""
    finish = policy.model.config.finalize_model_grads_func

    def watched(*args: Any, **kwargs: Any) -> None:
        groups = policy.ddp_model.bucket_groups
        seen.append(sum(group.grad_reduce_handle is not None for group in groups))
        finish(*args, **kwargs)

    return watched


def train(policy: Policy, rows: Any, *, steps: int) -> list[torch.Tensor]:
    for _ in range(steps):
        policy.update(rows, LOSS, lr=1e-3)
    return [p.detach().clone() for p in policy.model.parameters()]


def check_case(rank: int, case: tuple[Path, tuple[int, int, int], int, bool, bool, Path]) -> None:
    folder, layout, ep, distributed, overlap, out = case
    settings: dict[str, Any] = {"distributed_optimizer": distributed, "ep": ep}
    with patch.object(policy_optimizer, "DistributedDataParallelConfig", SMALL_BUCKETS):
        policy, context = make_policy(folder, layout, overlap_grad_reduce=overlap, **settings)
    # The norm adds up shards of other places, and its rounding would reach the clipped gradients.
    policy._optimizer_config = policy._optimizer_config.model_copy(update={"clip_grad": 1e9})
    seen: list[int] = []
    policy.model.config.finalize_model_grads_func = finalized(policy, seen)
    groups = groups_of(policy.model_shape.vocab_size)
    rows = rows_of(groups, context)
    few = rows_of(groups[:1], context, max_tokens=1000)  # a data parallel rank has an empty row
    store = CheckpointStore(out, keep=1, warn=print)
    mine = {"model": policy.model, "optimizer": policy.optimizer}
    if overlap:  # it goes on from what was saved without
        path = store.newest()
        assert path is not None
        load_checkpoint(path, **mine)
    else:
        train(policy, rows, steps=1)
        store.save(1, **mine, state={})
        store.wait()
    results = train(policy, rows, steps=2) + train(policy, few, steps=1)
    buckets = len(policy.ddp_model.bucket_groups)
    if overlap:
        assert buckets > 3 or context.pp.rank > 0
        # In the first update Megatron learns how often each weight gets a gradient.
        assert seen == [0, buckets, buckets]
        expected = torch.load(out / f"rank_{rank}.pt", weights_only=True)
        assert all(map(torch.equal, results, expected)), (layout, distributed)
    else:
        assert seen == [0] * 4
        torch.save(results, out / f"rank_{rank}.pt")
    store.close()


@pytest.mark.parametrize("distributed", [False, True])
def test_every_layout_is_bitwise_the_same(tmp_path: Path, distributed: bool) -> None:
    folder = tiny_hf(tmp_path / "hf", "qwen2", tie_word_embeddings=True)
    cases = []
    for layout in LAYOUTS:
        out = tmp_path / "-".join(map(str, layout))
        cases += [(folder, layout, 1, distributed, overlap, out) for overlap in (False, True)]
        out.mkdir()
    run_ranks(check_case, 2, cases)


@pytest.mark.parametrize("distributed", [False, True])
def test_experts_are_bitwise_the_same(tmp_path: Path, distributed: bool) -> None:
    """Their gradients are summed over other ranks. Some experts get no token."""
    folder = tiny_hf(tmp_path / "hf", "qwen3_moe", num_experts=32)
    cases = []
    for layout, ep in (((1, 1, 1), 1), ((1, 1, 1), 2), ((2, 1, 1), 1)):
        out = tmp_path / f"{layout[0]}-{ep}"
        cases += [(folder, layout, ep, distributed, overlap, out) for overlap in (False, True)]
        out.mkdir()
    run_ranks(check_case, 2, cases)
