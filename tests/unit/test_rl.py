"""The RL loop with hand-written parts that record what is asked of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_policy import FakePolicy, make_trainer

from megatron_qlrl.advantage.apply import with_advantages
from megatron_qlrl.config.schema import AlgorithmConfig, CurriculumConfig, StabilityConfig
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.curriculum.sampler import Sampler
from megatron_qlrl.evaluate.best import BestScore
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.metrics.monitor import Monitor
from megatron_qlrl.platform.progress import Progress
from megatron_qlrl.rl import RLParts, train_rl
from megatron_qlrl.rollout.vllm_engine import Sampling
from megatron_qlrl.train.phases import Phase
from megatron_qlrl.train.run import Run
from megatron_qlrl.types import Budget, Prompt, Rollout, Score, ScoredGroup

pytestmark = pytest.mark.usefixtures("lone_group")


def prompt(uid: str, num_tokens: int = 3) -> Prompt:
    return Prompt(uid, np.arange(num_tokens, dtype=np.int32), "docqa", "?", "!")


def scored(of: Prompt, *values: float | None) -> ScoredGroup:
    """Response k has k + 1 tokens, all of them k."""
    rollouts = tuple(
        Rollout(
            of.uid, k, np.full(k + 1, k, np.int32), np.full(k + 1, -0.5, np.float32), "", True, 0
        )
        for k in range(len(values))
    )
    return ScoredGroup(of, rollouts, tuple(Score(v, v or 0.0) for v in values))


def spread(rewards: np.ndarray) -> bool:
    return bool(np.nanmax(rewards) > np.nanmin(rewards))


STABILITY = {"window": 1, "reward_collapse": "stop", "reward_collapse_factor": 0.5}
PHASES = [Phase(0, "phase 0", 0, 2), Phase(1, "phase 1", 2, 5)]
SAMPLING = Sampling(1.0, 1.0, 9, 3)


class FakeRun:
    """Phases of 2 and 3 steps with 12 prompts each; of all prompts every other one has a
    spread in its first two samples, the third has no verdict. It is the collector, the recorder
    and what decides."""

    def __init__(self, **settings: Any) -> None:
        self.policy = FakePolicy()
        self.monitor = Monitor(StabilityConfig.model_validate(STABILITY), warn=lambda message: None)
        self.ranking = BestScore(None)
        self.collect_value = 1.0
        self.after_step: Callable[[int], None] = lambda step: None
        self.collected: list[tuple[int, list[str]]] = []
        self.recorded: list[tuple[int, dict[str, float], list[ScoredGroup]]] = []
        self.order: list[str] = []
        prompts = [prompt(f"{k}:{n}", 3 + 4 * k) for k in range(2) for n in range(12)]
        self.sampler = Sampler(
            Curriculum(prompts, limits=[4, 8], seed=0, config=CurriculumConfig.model_validate({})),
            config=AlgorithmConfig.model_validate(settings),
            prompts_per_step=4,
            carried_share=0.0,
            keep=spread,
            warn=lambda message: None,
        )

    @contextmanager
    def session(
        self, sampling: Sampling, *, step: int, meter: Meter, budget: Budget | None
    ) -> Iterator[Any]:
        assert sampling is SAMPLING and budget is None
        yield partial(self.collect, step)

    def collect(self, step: int, prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        self.order.append("collect")
        self.collected.append((step, [p.uid for p in prompts]))
        groups = [
            scored(p, self.collect_value, float(self.has_no_spread(p.uid)), None) for p in prompts
        ]
        version = self.policy.version
        return [
            replace(g, rollouts=tuple(replace(r, weight_version=version) for r in g.rollouts))
            for g in groups
        ]

    @staticmethod
    def has_no_spread(uid: str) -> bool:
        return int(uid.split(":")[1]) % 2 == 1

    def record(
        self,
        step: int,
        meter: Meter,
        groups: list[ScoredGroup],
        *,
        num_tokens: int,
        trainer: Any,
        data: Any,
    ) -> None:
        assert data is self.sampler
        assert trainer.policy is self.policy
        self.order.append("record")
        metrics = meter.summary() | self.monitor.end() | {"num_tokens": num_tokens}
        self.recorded.append((step, metrics, groups))

    def decide(self, phase: Phase, step: int) -> None:
        assert phase.first_step <= step < phase.end_step
        self.order.append("decide")
        self.after_step(step)

    def steps(self, phases: Sequence[Phase], first_step: int) -> Iterator[tuple[Phase, int]]:
        same: Any = self
        quiet = Progress(lambda _: None)
        run = Run(same, same, same, same, quiet, 5, 1, 3600.0, Path("unused"))
        return run.steps(phases, first_step)

    @property
    def recorder(self) -> "FakeRun":
        return self

    def train(self, first_step: int = 0, updates: int = 1) -> list[Any]:
        """(step, metrics, groups) of every step."""
        same: Any = self
        parts = RLParts(
            run=same,
            sampler=self.sampler,
            collector=same,
            sampling=SAMPLING,
            advantages=partial(
                with_advantages,
                kind="dr_grpo",
                deviation="group",
                task_of=lambda prompt: prompt.data_source,
                max_tokens=9,
                buffer_tokens=None,
            ),
            trainer=make_trainer(self.policy, updates_per_step=updates, permit=self.monitor.permit),
        )
        train_rl(parts, PHASES, first_step=first_step)
        return self.recorded

    @property
    def updates(self) -> list[int]:
        return [call[1] for call in self.policy.calls if call[0] == "update"]


def test_every_step_of_every_phase_in_order() -> None:
    run = FakeRun()
    recorded = run.train()
    assert [step for step, *_ in recorded] == [0, 1, 2, 3, 4]
    assert [m["curriculum/phase"] for _, m, _ in recorded] == [0, 0, 1, 1, 1]
    assert [(int(uids[0][0]), step) for step, uids in run.collected] == [
        (0, 0),
        (0, 1),
        (1, 2),
        (1, 3),
        (1, 4),
    ]
    assert all(len(uids) == 4 for _, uids in run.collected)
    assert [[g.prompt.uid for g in groups] for *_, groups in recorded] == [
        uids for _, uids in run.collected
    ]
    assert run.updates == [0, 1, 2, 3, 4]
    # Nothing runs ahead of what is decided after a step.
    assert run.order == ["collect", "record", "decide"] * 5


def test_no_group_without_spread_is_trained_on() -> None:
    run = FakeRun(generation_rounds=5)
    recorded = run.train()
    assert [len({b.group for b in row.blocks}) for row in run.policy.trained] == [4] * 5
    for row in run.policy.trained:
        assert set(row.columns["advantages"]) == {0.5, -0.5}
    assert sum(len(groups) for *_, groups in recorded) > 20


def test_surplus_waits_with_logprobs_taken_before_the_update() -> None:
    run = FakeRun(generation_rounds=5, oversampling=2.0, max_staleness=1)
    (_, first, _), (_, second, _) = run.train()[:2]
    held = int(first["batch/held_groups"])
    assert held > 0
    assert first["batch/staleness/max"] == 0
    assert second["batch/staleness/max"] == 1
    assert second["batch/staleness/mean"] == held / 4
    # What waited was sampled by version 0; the update itself gives the log-probs of the others.
    column = run.policy.trained[1].columns["old_logprobs"]
    assert (column == -1.0).sum() == 3 * held  # two responses with a verdict, 1 and 2 tokens
    assert np.isnan(column[column != -1.0]).all()
    assert np.isnan(column).any()
    assert "old_logprobs" not in run.policy.trained[0].columns


def test_steps_without_any_spread_are_no_updates_and_the_run_goes_on() -> None:
    run = FakeRun(generation_rounds=2)
    run.has_no_spread = lambda uid: True  # type: ignore[method-assign]
    recorded = run.train()
    assert [step for step, *_ in recorded] == [0, 1, 2, 3, 4]
    assert run.policy.calls == []
    for _, metrics, groups in recorded:
        assert len(groups) == metrics["batch/groups"] == 8
        assert metrics["batch/exhausted"] == 1
        assert metrics["batch/kept_groups"] == 0
        assert "actor/pg_loss" not in metrics


@pytest.mark.parametrize("first", [1, 3, 2, 5])
def test_resume_goes_on_at_the_next_step(first: int) -> None:
    run = FakeRun()
    want = list(range(first, 5))
    assert [(step, m["curriculum/phase"]) for step, m, _ in run.train(first)] == [
        (step, int(step >= 2)) for step in want
    ]
    assert [step for step, _ in run.collected] == want


def test_updates_are_numbered_through_the_run() -> None:
    run = FakeRun()
    run.has_no_spread = lambda uid: uid not in run.collected[-1][1][0]  # type: ignore
    run.train(3, updates=4)  # one kept group a step: one of the four updates happens
    assert run.updates == [12, 16]


def test_the_record_holds_the_steps_metrics() -> None:
    run = FakeRun()
    run.has_no_spread = lambda uid: uid not in run.collected[-1][1][:1]  # type: ignore
    _, metrics, groups = run.train(4)[0]
    assert len(groups) == 4
    want = {
        "actor/pg_loss": 4.0,
        "curriculum/new/drawn": 4.0,
        "curriculum/new/reached": 1.0,
        "curriculum/new/batch/groups": 4.0,
        "source/docqa/batch/groups": 4.0,
        "batch/groups": 4.0,
        "batch/kept_groups": 1.0,
        "critic/rewards/mean": 0.875,
        "critic/rewards/masked": 4.0,
    }
    assert {name: metrics[name] for name in want} == want
    assert "curriculum/carried/batch/groups" not in metrics
    assert metrics["timing_s/step"] >= metrics["timing_s/update_actor"] >= 0
    # four groups: a prompt of 7 and responses of 1, 2 and 3 tokens each
    assert metrics["num_tokens"] == 52


def test_the_monitor_judges_each_step_before_its_updates() -> None:
    run = FakeRun()
    demands = []

    def after_step(step: int) -> None:
        demands.append((step, run.monitor.demand, run.recorded[-1][1]["stability/reward_collapse"]))
        if step == 2:  # from now on all answers are wrong
            run.collect_value = 0.0

    run.after_step = after_step
    run.train()
    assert demands[:4] == [(0, None, 0), (1, None, 0), (2, None, 0), (3, "stop", 1)]
    assert run.updates[:4] == [0, 1, 2, 3]


def test_the_monitor_is_told_the_phase_of_each_step() -> None:
    """It compares no rewards of two phases: fewer answers are right from the first step of phase 1
    on, and that is no collapse."""
    run = FakeRun()
    phases = []

    def after_step(step: int) -> None:
        phases.append(run.monitor.state_dict()["phase"])
        run.collect_value = float(step < 1)

    run.after_step = after_step
    run.train()
    assert phases == [0, 0, 1, 1, 1]
    assert run.recorded[2][1]["stability/reward_collapse"] == 0


def test_what_a_step_raises_ends_the_loop() -> None:
    run = FakeRun()

    def after_step(step: int) -> None:
        raise KeyError(step)

    run.after_step = after_step
    with pytest.raises(KeyError):
        run.train()
    assert run.order == ["collect", "record", "decide"]
