"""An update that a stability rule refuses is refused on every rank and leaves no trace: weights,
optimizer state and the next update are bitwise those of a policy that never met it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import rows_of, run_ranks, tiny_hf
from test_policy_parity import LOSS, groups_of, make_policy

from megatron_qlrl.config.schema import StabilityConfig
from megatron_qlrl.metrics.monitor import Monitor
from megatron_qlrl.parallel.collectives import gather_objects
from megatron_qlrl.types import PackedRow

GOOD_STEPS = 3
Layout = tuple[int, int, int]


def rows_with_reference(policy: Any, context: Any) -> list[PackedRow]:
    """This rank's rows; the reference is the policy itself, so that the KL starts at 0."""
    rows = rows_of(groups_of(policy.model_shape.vocab_size), context)
    return policy.add_logprobs(rows, "ref_logprobs")


def changed(rows: Sequence[PackedRow], column: str, value: Any) -> list[PackedRow]:
    def change(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**columns, column: (columns[column] + value).astype(np.float32)}

    return [replace(row, columns=change(row.columns)) for row in rows]


def inject(fault: str, rows: list[PackedRow], context: Any) -> list[PackedRow]:
    """The fault lies in the last data parallel rank's rows alone."""
    if context.dp.rank < context.dp.size - 1:
        return rows
    if fault == "non_finite":
        return changed(rows, "advantages", np.nan)
    return changed(rows, "ref_logprobs", 4.0) if fault == "kl_spike" else rows


def state_of(policy: Any) -> list[torch.Tensor]:
    """Copies of all weights, moments and step counters of this rank."""
    parts = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    moments = [
        torch.as_tensor(value)
        for part in parts
        for state in part.optimizer.state.values()
        for value in state.values()
    ]
    return [t.detach().clone() for t in (*policy.model.parameters(), *moments)]


def step(
    policy: Any, context: Any, monitor: Monitor, number: int, fault: str | None = None
) -> dict[str, float]:
    reward = 0.0 if fault == "reward_collapse" else 0.5
    monitor.begin(number, 0, {"critic/rewards/mean": reward})
    rows = rows_with_reference(policy, context)
    if fault is not None:
        rows = inject(fault, rows, context)
    policy.update(rows, LOSS, lr=1e-3, permit=monitor.permit)
    return monitor.end()


def check_case(rank: int, case: tuple[Path, Layout, bool, str, str, Path]) -> None:
    folder, layout, distributed, fault, action, out = case
    policy, context = make_policy(folder, layout, distributed_optimizer=distributed)
    settings = {"window": GOOD_STEPS, fault: action} if action else {}
    monitor = Monitor(StabilityConfig.model_validate(settings), warn=lambda message: None)
    for number in range(GOOD_STEPS):
        step(policy, context, monitor, number)
    assert policy.version == GOOD_STEPS
    if action:
        before = state_of(policy)
        counts = step(policy, context, monitor, GOOD_STEPS, fault)
        assert counts[f"stability/{fault}"] == counts["stability/skipped"] == 1
        assert policy.version == GOOD_STEPS
        after = state_of(policy)
        assert len(before) == len(after) > len(list(policy.model.parameters()))
        assert all(map(torch.equal, before, after))
        told = gather_objects((monitor.demand, monitor.reason))
        assert len(set(told)) == 1
        assert told[0][0] == (None if action == "skip" else action)
    step(policy, context, monitor, GOOD_STEPS + 1)
    file = out / f"{'_'.join(map(str, layout))}_{distributed}_{rank}.pt"
    if action:
        expected = torch.load(file, weights_only=True)
        assert all(map(torch.equal, state_of(policy), expected))
    else:
        torch.save(state_of(policy), file)


def test_refused_update_leaves_no_trace(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "hf", "qwen2")
    layouts = [((1, 1, 1), True), ((2, 1, 1), False), ((1, 2, 1), True), ((1, 1, 2), False)]
    actions = {"non_finite": "skip", "kl_spike": "stop", "reward_collapse": "roll_back"}
    cases = [
        (folder, layout, distributed, fault, action, tmp_path)
        for layout, distributed in layouts
        for fault, action in [("", ""), *actions.items()]
    ]
    run_ranks(check_case, 2, cases)


def check_plain(rank: int, folder: Path) -> None:
    policy, context = make_policy(folder, (1, 1, 1))
    before = state_of(policy)
    rows = inject("non_finite", rows_with_reference(policy, context), context)
    metrics = policy.update(rows, LOSS, lr=1e-3)
    assert np.isnan(metrics["actor/grad_norm"])
    assert policy.version == 0
    assert all(map(torch.equal, before, state_of(policy)))
    policy.update(rows, LOSS, lr=1e-3, permit=lambda metrics: rank == 0)
    assert policy.version == 0  # one rank's no is every rank's


def test_nan_of_one_rank_reaches_no_weight_without_a_monitor_too(tmp_path: Path) -> None:
    run_ranks(check_plain, 2, [tiny_hf(tmp_path, "qwen2")])
