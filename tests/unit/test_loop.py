"""The RL loop with hand-written parts that record what is asked of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_qlrl.config.schema import AlgorithmConfig, CurriculumConfig, StabilityConfig
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.curriculum.dynamic import DynamicSampler
from megatron_qlrl.loop import (
    Logprobs,
    Phase,
    Trainer,
    run_phases,
    split_updates,
    to_train_groups,
    train_on,
    with_old_logprobs,
)
from megatron_qlrl.metrics.monitor import Monitor
from megatron_qlrl.types import (
    Block,
    PackedRow,
    Prompt,
    Rollout,
    Score,
    ScoredGroup,
    TrainGroup,
    TrainResponse,
)


def prompt(uid: str, num_tokens: int = 3) -> Prompt:
    return Prompt(uid, np.arange(num_tokens, dtype=np.int32), "docqa", "?", "!")


def scored(of: Prompt, *values: float | None, finished: bool = True) -> ScoredGroup:
    """Response k has k + 1 tokens, all of them k."""
    rollouts = tuple(
        Rollout(
            of.uid,
            k,
            np.full(k + 1, k, np.int32),
            np.full(k + 1, -0.5, np.float32),
            "",
            finished,
            0,
        )
        for k in range(len(values))
    )
    return ScoredGroup(of, rollouts, tuple(Score(v, v or 0.0) for v in values))


def minus_mean(group: ScoredGroup) -> np.ndarray:
    return np.nan_to_num(group.rewards - np.nanmean(group.rewards))


def spread(rewards: np.ndarray) -> bool:
    return bool(np.nanmax(rewards) > np.nanmin(rewards))


class FakeTrainer:
    """Policy of `version`: the log-probs it adds are -version - 1. One row a mini-batch."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.packed: list[TrainGroup] = []
        self.trained: list[PackedRow] = []
        self.version = 0

    def pack(self, groups: Sequence[TrainGroup]) -> list[PackedRow]:
        """Groups in reverse order, so that nothing can rely on the order."""
        self.calls.append(("pack", len(groups)))
        self.packed += groups
        blocks, at = [], 0
        for index in reversed(range(len(groups))):
            lengths = [len(r.token_ids) for r in groups[index].responses]
            ends = (at + 1 + np.cumsum(lengths)).tolist()
            starts = [at + 1, *ends[:-1]]
            spans = tuple(zip(starts, ends, strict=False))
            blocks.append(Block(index, tuple(range(len(lengths))), (at, at + 1), spans))
            at = ends[-1] if ends else at + 1
        tokens = np.zeros(at, np.int32)
        return [PackedRow(tokens, tokens, tuple(blocks), {})]

    def add_logprobs(self, rows: Sequence[PackedRow], name: str) -> list[PackedRow]:
        self.calls.append((name, len(rows[0].blocks)))
        return [
            replace(
                row,
                columns={
                    **row.columns,
                    name: np.full(row.num_response_tokens, -self.version - 1.0, np.float32),
                },
            )
            for row in rows
        ]

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.calls.append("reference weights")
        yield
        self.calls.append("own weights")

    def update(self, rows: Sequence[PackedRow], number: int) -> dict[str, float]:
        self.calls.append(("update", number, sorted(rows[0].columns)))
        self.trained += rows
        self.version += 1
        return {"actor/pg_loss": float(number)}

    def gather(self, mine: Logprobs) -> Logprobs:
        return mine

    def parts(self, *, reference: bool) -> Trainer:
        context = self.reference if reference else None
        return Trainer(self.pack, self.add_logprobs, context, self.update, self.gather)


def batch_of(num: int) -> list[TrainGroup]:
    return [TrainGroup(np.array([i], np.int32), ()) for i in range(num)]


def test_all_logprobs_are_taken_before_the_first_update() -> None:
    fake = FakeTrainer()
    found = list(train_on(batch_of(5), fake.parts(reference=True), first_update=8, num_updates=2))
    assert fake.calls == [
        ("pack", 2),
        ("pack", 3),
        "reference weights",
        ("ref_logprobs", 2),
        ("ref_logprobs", 3),
        "own weights",
        ("old_logprobs", 2),
        ("old_logprobs", 3),
        ("update", 8, ["old_logprobs", "ref_logprobs"]),
        ("update", 9, ["old_logprobs", "ref_logprobs"]),
    ]
    assert found == [{"actor/pg_loss": 8.0}, {"actor/pg_loss": 9.0}]


def test_one_update_needs_no_old_logprobs() -> None:
    fake = FakeTrainer()
    list(train_on(batch_of(5), fake.parts(reference=False), first_update=0, num_updates=1))
    assert fake.calls == [("pack", 5), ("update", 0, [])]


def test_one_group_left_for_two_updates_is_one_update() -> None:
    fake = FakeTrainer()
    list(train_on(batch_of(1), fake.parts(reference=True), first_update=4, num_updates=2))
    assert fake.calls[-1] == ("update", 4, ["ref_logprobs"])
    assert sum(call[0] == "update" for call in fake.calls) == 1


def test_empty_batch_is_no_update() -> None:
    fake = FakeTrainer()
    assert not list(train_on([], fake.parts(reference=False), first_update=0, num_updates=2))
    assert fake.calls == []


@pytest.mark.parametrize(
    ("groups", "updates", "want"), [(7, 3, [2, 2, 3]), (2, 4, [1, 1]), (0, 2, []), (4, 1, [4])]
)
def test_mini_batches_are_whole_groups_in_order(groups: int, updates: int, want: list[int]) -> None:
    batch = batch_of(groups)
    shares = split_updates(batch, updates)
    assert [len(share) for share in shares] == want
    assert [group for share in shares for group in share] == batch


def test_samples_without_verdict_are_left_out() -> None:
    group = scored(prompt("b", 4), None, 1.0, 0.0, None, 0.5)
    (kept,) = to_train_groups([group], minus_mean)
    assert kept.prompt_ids is group.prompt.token_ids
    assert [r.token_ids.tolist() for r in kept.responses] == [[1, 1], [2, 2, 2], [4] * 5]
    assert [r.advantage for r in kept.responses] == [0.5, -0.5, 0.0]
    for response, k in zip(kept.responses, (1, 2, 4), strict=True):
        assert response.engine_logprobs is group.rollouts[k].engine_logprobs
        assert response.old_logprobs is None


def test_groups_that_wait_keep_the_logprobs_of_the_weights_that_sampled_them() -> None:
    fake = FakeTrainer()
    fake.version = 2
    early = replace(scored(prompt("a"), 1.0, 0.0), old_logprobs=(np.zeros(1), np.zeros(2)))
    groups = [scored(prompt("b"), 1.0, None), early, scored(prompt("c"), 0.0, 1.0, 0.0)]
    held = with_old_logprobs(groups, fake.parts(reference=False))
    assert held[1] is early
    assert fake.calls == [("pack", 2), ("old_logprobs", 2)]
    for group, lengths in ((held[0], [1, 2]), (held[2], [1, 2, 3])):
        assert group.old_logprobs is not None
        assert [old.tolist() for old in group.old_logprobs] == [[-3.0] * n for n in lengths]
    fake.calls.clear()
    assert with_old_logprobs([], fake.parts(reference=False)) == []
    assert fake.calls == []


def test_the_old_policy_of_a_group_is_the_one_that_sampled_it() -> None:
    fake = FakeTrainer()
    fake.version = 4
    known = np.array([-0.25, -0.5], np.float32)
    waited = TrainGroup(
        np.zeros(1, np.int32), (TrainResponse(np.zeros(2, np.int32), 1.0, None, known),)
    )
    fresh = TrainGroup(np.zeros(1, np.int32), (TrainResponse(np.zeros(3, np.int32), -1.0),))
    list(train_on([waited, fresh], fake.parts(reference=False), first_update=0, num_updates=1))
    assert fake.calls == [("pack", 2), ("old_logprobs", 2), ("update", 0, ["old_logprobs"])]
    # the row has the groups in reverse order
    assert fake.trained[0].columns["old_logprobs"].tolist() == [-5.0] * 3 + [-0.25, -0.5]


STABILITY = {"window": 1, "reward_collapse": "stop", "reward_collapse_factor": 0.5}


class FakeRun:
    """Phases of 2 and 3 steps with 12 prompts each; of all prompts every other one has a
    spread in its first two samples, the third has no verdict."""

    def __init__(self, **settings: Any) -> None:
        self.trainer = FakeTrainer()
        self.monitor = Monitor(StabilityConfig.model_validate(STABILITY), warn=lambda message: None)
        self.collect_value = 1.0
        self.collected: list[tuple[int, list[str]]] = []
        self.observed: list[ScoredGroup] = []
        prompts = [prompt(f"{k}:{n}", 3 + 4 * k) for k in range(2) for n in range(12)]
        self.curriculum = Curriculum(
            prompts, limits=[4, 8], seed=0, config=CurriculumConfig.model_validate({})
        )
        self.sampler = DynamicSampler(
            self.curriculum,
            config=AlgorithmConfig.model_validate(settings),
            carried_share=0.0,
            keep=spread,
            collect=self.collect,
            version=lambda: self.trainer.version,
            warn=lambda message: None,
        )

    def collect(self, prompts: Sequence[Prompt], step: int) -> list[ScoredGroup]:
        self.collected.append((step, [p.uid for p in prompts]))
        groups = [
            scored(p, self.collect_value, float(self.has_no_spread(p.uid)), None) for p in prompts
        ]
        version = self.trainer.version
        return [
            replace(g, rollouts=tuple(replace(r, weight_version=version) for r in g.rollouts))
            for g in groups
        ]

    @staticmethod
    def has_no_spread(uid: str) -> bool:
        return int(uid.split(":")[1]) % 2 == 1

    def steps(self, first_step: int, updates: int = 1) -> Iterator[Any]:
        return run_phases(
            [Phase(0, "phase 0", 0, 2), Phase(1, "phase 1", 2, 5)],
            first_step=first_step,
            prompts_per_step=4,
            updates_per_step=updates,
            sampler=self.sampler,
            advantages=minus_mean,
            trainer=self.trainer.parts(reference=False),
            monitor=self.monitor,
        )


def test_every_step_of_every_phase_in_order() -> None:
    run = FakeRun()
    found = list(run.steps(0))
    want = [(0, 0), (0, 1), (1, 2), (1, 3), (1, 4)]
    assert [(phase.index, report.step) for phase, report, _ in found] == want
    assert [(int(uids[0][0]), step) for step, uids in run.collected] == want
    assert all(len(uids) == 4 for _, uids in run.collected)
    assert [[g.prompt.uid for g in groups] for *_, groups in found] == [
        uids for _, uids in run.collected
    ]
    updates = [c[1] for c in run.trainer.calls if c[0] == "update"]
    assert updates == [0, 1, 2, 3, 4]


def test_no_group_without_spread_is_trained_on() -> None:
    run = FakeRun(generation_rounds=5)
    found = list(run.steps(0))
    assert [len(row.blocks) for row in run.trainer.trained] == [4] * 5
    assert len(run.trainer.packed) == 20
    for group in run.trainer.packed:
        assert {r.advantage for r in group.responses} == {0.5, -0.5}
    assert sum(len(groups) for *_, groups in found) > 20


def test_surplus_waits_with_logprobs_taken_before_the_update() -> None:
    run = FakeRun(generation_rounds=5, oversampling=2.0, max_staleness=1)
    (_, first, _), (_, second, _) = [step for step, _ in zip(run.steps(0), range(2), strict=False)]
    held = int(first.metrics["batch/held_groups"])
    assert held > 0
    assert first.metrics["batch/staleness/max"] == 0
    assert second.metrics["batch/staleness/max"] == 1
    assert second.metrics["batch/staleness/mean"] == held / 4
    # What waited was sampled by version 0, the others by version 1.
    columns = run.trainer.trained[1].columns["old_logprobs"].tolist()
    assert sorted(set(columns)) == [-2.0, -1.0]
    assert columns.count(-1.0) == 3 * held  # two responses with a verdict, 1 and 2 tokens
    assert "old_logprobs" not in run.trainer.trained[0].columns


def test_steps_without_any_spread_are_no_updates_and_the_run_goes_on() -> None:
    run = FakeRun(generation_rounds=2)
    run.has_no_spread = lambda uid: True  # type: ignore[method-assign]
    found = list(run.steps(0))
    assert [report.step for _, report, _ in found] == [0, 1, 2, 3, 4]
    assert run.trainer.calls == []
    for _, report, groups in found:
        assert len(groups) == report.metrics["batch/groups"] == 8
        assert report.metrics["batch/exhausted"] == 1
        assert report.metrics["batch/kept_groups"] == 0
        assert "actor/pg_loss" not in report.metrics


@pytest.mark.parametrize("first", [1, 3, 2, 5])
def test_resume_goes_on_at_the_next_step(first: int) -> None:
    run = FakeRun()
    want = [(int(step >= 2), step) for step in range(first, 5)]
    assert [(phase.index, report.step) for phase, report, _ in run.steps(first)] == want
    assert [step for step, _ in run.collected] == [step for _, step in want]


def test_updates_are_numbered_through_the_run() -> None:
    run = FakeRun()
    run.has_no_spread = lambda uid: uid not in run.collected[-1][1][0]  # type: ignore
    list(run.steps(3, updates=4))  # one kept group a step: one of the four updates happens
    assert [c[1] for c in run.trainer.calls if c[0] == "update"] == [12, 16]


def test_reports_hold_the_steps_metrics() -> None:
    run = FakeRun()
    run.has_no_spread = lambda uid: uid not in run.collected[-1][1][:1]  # type: ignore
    phase, report, groups = next(run.steps(4))
    metrics = report.metrics
    assert phase.name == "phase 1"
    assert len(groups) == 4
    want = {
        "actor/pg_loss": 4.0,
        "curriculum/new/drawn": 4.0,
        "curriculum/new/reached": 1.0,
        "batch/groups": 4.0,
        "batch/kept_groups": 1.0,
        "critic/rewards/mean": 0.875,
        "critic/rewards/masked": 4.0,
    }
    assert {name: metrics[name] for name in want} == want
    step, gen, update = (metrics[f"timing_s/{n}"] for n in ("step", "gen", "update_actor"))
    assert step >= gen + update >= 0
    # four groups: a prompt of 7 and responses of 1, 2 and 3 tokens each
    assert metrics["perf/total_num_tokens"] == 52
    assert metrics["perf/throughput"] * step == pytest.approx(52)


def test_a_step_is_only_taken_when_it_is_asked_for() -> None:
    """The caller saves and evaluates between steps: nothing may run ahead of it."""
    run = FakeRun()
    steps = run.steps(0)
    assert run.collected == []
    next(steps)
    assert [step for step, _ in run.collected] == [0]


def test_the_monitor_judges_each_step_before_its_updates() -> None:
    run = FakeRun()
    found = []
    for _, report, _ in run.steps(0):
        found.append((report.step, run.monitor.demand, report.metrics["stability/reward_collapse"]))
        if report.step == 2:  # from now on all answers are wrong
            run.collect_value = 0.0
    assert found[:4] == [(0, None, 0), (1, None, 0), (2, None, 0), (3, "stop", 1)]


def test_the_record_tells_new_from_carried_and_the_data_sources() -> None:
    _, report, _ = next(FakeRun().steps(0))
    assert report.metrics["curriculum/new/batch/groups"] == 4
    assert report.metrics["source/docqa/batch/groups"] == 4
    assert "curriculum/carried/batch/groups" not in report.metrics
