"""Gradients of shared rows equal those of separate rows, in float32 and in float64.

The separate side is one prompt with one response in each row on one rank without any sharding;
the shared side runs every layout. In float32 shared rows are as near to the gradients of float64 as
separate rows are; in float64 the difference is far below anything that float32 could show.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import rows_of, run_ranks, tiny_hf
from test_policy_parity import LOSS, make_policy

from megatron_qlrl.types import TrainGroup, TrainResponse
from megatron_qlrl.weights.stream import WeightStream
from tests.parity import Reference, pooled

VOCAB = 157
CLOSE = 1e-10
"""In float64: the norm of the difference of all gradients over their norm."""


def make_groups() -> list[TrainGroup]:
    """Unequal lengths, a group of 1, an empty and a one-token response, and two prompts that
    differ in one token only."""
    rng = np.random.default_rng(7)

    def response(n: int) -> TrainResponse:
        engine = rng.normal(-3, 0.5, n).astype(np.float32)
        return TrainResponse(rng.integers(0, VOCAB, n).astype(np.int32), rng.normal(), engine)

    def group(prompt: np.ndarray, lengths: Sequence[int]) -> TrainGroup:
        return TrainGroup(prompt.astype(np.int32), tuple(response(n) for n in lengths))

    first = rng.integers(0, VOCAB, 40)
    twin = first.copy()
    twin[17] = (twin[17] + 1) % VOCAB
    return [
        group(first, [9, 1, 14, 3]),
        group(twin, [9, 6]),
        group(rng.integers(0, VOCAB, 21), [11]),
        group(rng.integers(0, VOCAB, 30), [0, 5, 8]),
    ]


def gradients(
    folder: Path, layout: tuple[int, int, int], dtype: str, *, share: bool, **settings: Any
) -> dict[str, torch.Tensor]:
    """Hugging Face name -> summed gradient, in float64."""
    policy, context = make_policy(folder, layout, dtype=getattr(torch, dtype), **settings)
    rows = rows_of(
        make_groups(),
        context,
        max_tokens=150 if share else 60,  # several prompts in a row; one response in a row
        share_prompts=share,
    )
    if share:
        assert any(len(row.blocks) > 1 for row in rows) or context.dp.size > 1
    policy.update(rows, LOSS, lr=1e-3, permit=lambda _: False)  # leave gradients as they are
    stream = WeightStream(
        policy.model, shape=policy.model_shape, context=context, bucket_bytes=20_000
    )
    stream._parameters = {n: p.main_grad for n, p in policy.model.named_parameters()}
    found = {name: grad.double().clone() for name, grad in stream}
    assert all(p.main_grad.dtype == getattr(torch, dtype) for p in policy.model.parameters())
    return found


def check(rank: int, case: tuple[Path, tuple[int, int, int], str, Path, dict[str, Any]]) -> None:
    folder, layout, dtype, expected, settings = case
    if not expected.exists():  # the first case of one rank is the separate side
        torch.save(gradients(folder, (1, 1, 1), dtype, share=False), expected)
        return
    want, exact = (
        torch.load(expected.with_name(f"{name}.pt"), weights_only=True)
        for name in (dtype, "float64")
    )
    found = gradients(folder, layout, dtype, share=True, **settings)
    assert set(found) == set(want)
    if dtype == "float32":
        peer = Reference.of(pooled(exact, exact), pooled(want, exact))
        peer.check(pooled(found, exact), (layout, settings))
        return
    apart = sum(float((found[n] - want[n]).norm() ** 2) for n in want) ** 0.5
    error = apart / sum(float(want[n].norm() ** 2) for n in want) ** 0.5
    assert error < CLOSE, (layout, settings, error)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """For each type: the model and the separate rows' gradients."""
    root = tmp_path_factory.mktemp("sharing")
    folder = tiny_hf(root / "qwen2", "qwen2")
    found = {dtype: (folder, root / f"{dtype}.pt") for dtype in ("float32", "float64")}
    run_ranks(
        check, 1, [(folder, (1, 1, 1), dtype, path, {}) for dtype, (_, path) in found.items()]
    )
    return found


LAYOUTS = [(tp, pp, cp) for tp in (1, 2) for pp in (1, 2) for cp in (1, 2)]
VARIANTS: list[dict[str, Any]] = [{"recompute": "full"}, {"recompute": "selective"}]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_shared_rows_equal_separate_rows(
    world_size: int, expected: dict[str, tuple[Path, Path]]
) -> None:
    layouts = [layout for layout in LAYOUTS if int(np.prod(layout)) == world_size]
    cases = [
        (folder, layout, dtype, path, settings)
        for dtype, (folder, path) in expected.items()
        for layout in layouts
        for settings in [{}, *(VARIANTS if dtype == "float32" and world_size != 2 else [])]
    ]
    run_ranks(check, world_size, cases)
