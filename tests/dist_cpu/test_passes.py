"""The forward passes and gradient preparations that a step leaves out change no bit of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from harness import run_ranks, tiny_hf
from test_policy_parity import groups_of, policy_on

from megatron_qlrl.config.schema import AlgorithmConfig, OptimizerConfig, PolicyConfig
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.parallel.context import ParallelContext, init_parallel
from megatron_qlrl.policy.loss import PolicyLoss
from megatron_qlrl.policy.policy import Policy
from megatron_qlrl.train.trainer import Trainer
from megatron_qlrl.types import TrainGroup

LOSS = PolicyLoss(AlgorithmConfig.model_validate({"rollout_is_threshold": 2.0, "kl_coef": 0.1}))
LAYOUTS = {1: [(1, 1, 1)], 2: [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1)]}


class EveryPass(Policy):
    """Computes the old log-probs of every mini-batch by a pass of its own. (The first one's at its
    update, whose weights are those before it.)"""

    def update(self, rows: Any, loss: Any, **settings: Any) -> dict[str, float]:
        rows = self.add_logprobs(rows, "old_logprobs")
        assert not any(row.columns["old_logprobs"].size == 0 for row in rows)
        with patch("megatron_qlrl.policy.policy.clip_and_step", megatrons_step):
            return super().update(rows, loss, **settings)


def megatrons_step(optimizer: Any, norm: float, *, max_norm: float) -> None:
    """Prepares the gradients once more, takes their norm, clips them and steps."""
    successful, again, _ = optimizer.step()
    assert successful
    assert again == norm > max_norm


def loud_groups() -> list[TrainGroup]:
    """Groups with advantages so large that the gradients are clipped."""
    return [
        replace(
            group,
            responses=tuple(replace(r, advantage=100 * r.advantage) for r in group.responses),
        )
        for group in groups_of(157)
    ]


def trained(
    kind: type[Policy], context: ParallelContext, folder: Path, settings: dict[str, Any]
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Weights and metrics after two steps of two updates, the second of them off-policy."""
    policy = policy_on(context, folder, **settings)
    policy.__class__ = kind
    policy.keep_reference()
    trainer = Trainer(
        policy,
        config=PolicyConfig.model_validate({"max_tokens_per_row": 64}),
        optimizer_config=OptimizerConfig.model_validate({"lr": 1e-2}),
        loss=LOSS,
        aggregation="token_mean",
        constant_tokens=1,
        updates_per_step=2,
        total_steps=2,
        use_reference=True,
        reference_every=1,
        permit=lambda metrics: True,
    )
    trainer._sharing_checked = True
    meter = Meter()
    for step in range(2):
        trainer.update(loud_groups(), step=step, meter=meter)
    weights = [p.detach().clone() for p in policy.model.parameters()]
    metrics = {k: v for k, v in meter.summary().items() if not k.startswith(("timing", "perf"))}
    return weights, metrics


def check(rank: int, case: tuple[Path, tuple[int, int, int], dict[str, Any]]) -> None:
    folder, (tp, pp, cp), settings = case
    context = init_parallel(tp=tp, pp=pp, cp=cp, seed=1)
    weights, metrics = trained(Policy, context, folder, settings)
    others, theirs = trained(EveryPass, context, folder, settings)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True)), case
    assert metrics == theirs
    assert metrics["actor/ppo_kl"] != 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_are_bitwise_those_with_every_pass(tmp_path: Path, world_size: int) -> None:
    folder = tiny_hf(tmp_path / "model", "qwen2")
    cases = [
        (folder, layout, {"dtype": dtype, "distributed_optimizer": distributed})
        for layout in LAYOUTS[world_size]
        for dtype in (torch.float32, torch.bfloat16)
        for distributed in (False, True)
    ]
    run_ranks(check, world_size, cases)
