"""A policy that computes nothing and notes what is asked of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_qlrl.config.schema import OptimizerConfig, PolicyConfig
from megatron_qlrl.config.shape import read_shape
from megatron_qlrl.train.trainer import Trainer
from megatron_qlrl.types import PackedRow

BASE = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "base"


class FakePolicy:
    """The log-probs that it adds are -version - 1; known ones stay, as in the real policy."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.trained: list[PackedRow] = []
        self.version = 0
        self.model_shape = read_shape(BASE, rope_scaling=None)
        one = SimpleNamespace(size=1, rank=0)
        self.context = SimpleNamespace(dp=one, rank=0, world_size=1)

    def add_logprobs(self, rows: Sequence[PackedRow], name: str) -> list[PackedRow]:
        self.calls.append((name, num_groups(rows)))
        return [
            replace(row, columns={**row.columns, name: self._column(row, name)}) for row in rows
        ]

    def _column(self, row: PackedRow, name: str) -> np.ndarray:
        values = np.full(row.num_response_tokens, -self.version - 1.0, np.float32)
        known = row.columns.get(name)
        return values if known is None else np.where(np.isnan(known), values, known)

    @contextmanager
    def optimizer_at_hand(self) -> Iterator[None]:
        self.calls.append("optimizer at hand")
        yield

    def fresh_moments(self) -> None:
        self.calls.append("fresh moments")

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        self.calls.append("reference weights")
        yield
        self.calls.append("own weights")

    def update(
        self, rows: Sequence[PackedRow], loss: Any, *, lr: float, permit: Any
    ) -> dict[str, float]:
        number = round(lr) - 1  # `make_trainer`: the rate says the number of the update
        self.calls.append(("update", number, sorted(c for c in rows[0].columns if "logp" in c)))
        self.trained += rows
        metrics = {
            "actor/pg_loss": float(number),
            "actor/grad_norm": 1.0,
            "actor/response_entropy": float(number),
        }
        if permit(metrics):
            self.version += 1
        return metrics


def num_groups(rows: Sequence[PackedRow]) -> int:
    return len({block.group for row in rows for block in row.blocks})


def make_trainer(policy: FakePolicy, **settings: Any) -> Trainer:
    """Rates are 1, 2, 3 ...: a warm-up that never ends. Sharing is not checked."""
    options: dict[str, Any] = {
        "aggregation": "token_mean",
        "constant_tokens": 1,
        "updates_per_step": 1,
        "total_steps": 10,
        "use_reference": False,
        "reference_every": 1,
        "permit": lambda metrics: True,
    }
    trainer = Trainer(
        policy,  # pyright: ignore[reportArgumentType]
        config=PolicyConfig.model_validate({}),
        optimizer_config=OptimizerConfig.model_validate({"lr": 1000.0, "warmup_steps": 1000}),
        loss=None,  # pyright: ignore[reportArgumentType]
        **options | settings,
    )
    trainer._sharing_checked = True
    return trainer
