"""The RL loop with hand-written parts that record what is asked of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_qlrl.loop import (
    Phase,
    Trainer,
    rollout_metrics,
    run_phases,
    split_updates,
    to_train_groups,
    train_on,
)
from megatron_qlrl.types import Block, PackedRow, Prompt, Rollout, Score, ScoredGroup, TrainGroup


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


def minus_mean(rewards: np.ndarray) -> np.ndarray:
    return np.nan_to_num(rewards - np.nanmean(rewards))


def spread(rewards: np.ndarray) -> bool:
    return bool(np.nanmax(rewards) > np.nanmin(rewards))


class FakeTrainer:
    """A row stands for a mini-batch: its tokens are the number of groups in it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.packed: list[TrainGroup] = []

    def pack(self, groups: Sequence[TrainGroup]) -> list[PackedRow]:
        self.calls.append(("pack", len(groups)))
        self.packed += groups
        tokens = np.zeros(len(groups), np.int32)
        return [PackedRow(tokens, tokens, (Block(0, (), (0, len(groups)), ()),), {})]

    def add_logprobs(self, rows: Sequence[PackedRow], name: str) -> list[PackedRow]:
        self.calls.append((name, rows[0].num_tokens))
        return [replace(row, columns={**row.columns, name: np.zeros(1)}) for row in rows]

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.calls.append("reference weights")
        yield
        self.calls.append("own weights")

    def update(self, rows: Sequence[PackedRow], number: int) -> dict[str, float]:
        self.calls.append(("update", number, sorted(rows[0].columns)))
        return {"actor/pg_loss": float(number)}

    def parts(self, *, reference: bool) -> Trainer:
        context = self.reference if reference else None
        return Trainer(self.pack, self.add_logprobs, context, self.update)


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


def test_groups_without_spread_and_samples_without_verdict_are_left_out() -> None:
    groups = [
        scored(prompt("a"), 1.0, 1.0),
        scored(prompt("b", 4), None, 1.0, 0.0, None, 0.5),
        scored(prompt("c"), 0.0, None),
    ]
    (kept,) = to_train_groups(groups, minus_mean, spread)
    assert kept.prompt_ids is groups[1].prompt.token_ids
    assert [r.token_ids.tolist() for r in kept.responses] == [[1, 1], [2, 2, 2], [4] * 5]
    assert [r.advantage for r in kept.responses] == [0.5, -0.5, 0.0]
    for response, k in zip(kept.responses, (1, 2, 4), strict=True):
        assert response.engine_logprobs is groups[1].rollouts[k].engine_logprobs


class FakeRun:
    """Phases of 2 and 3 steps. Prompt "<phase>:<n>"; only group n = step % 2 has a spread."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.trainer = FakeTrainer()

    def phase(self, index: int, first: int, end: int) -> Phase:
        def draw(num: int) -> list[Prompt]:
            self.calls.append(("draw", index, num))
            return [prompt(f"{index}:{n}") for n in range(num)]

        def observe(groups: Sequence[ScoredGroup]) -> None:
            self.calls.append(("observe", index, [g.prompt.uid for g in groups]))

        return Phase(
            index,
            f"phase {index}",
            first,
            end,
            draw,
            observe,
            lambda: {"curriculum/x": index + 0.5},
        )

    def collect(self, prompts: Sequence[Prompt], step: int) -> list[ScoredGroup]:
        self.calls.append(("collect", step))
        return [scored(p, 1.0, 0.0 if n == step % 2 else 1.0, None) for n, p in enumerate(prompts)]

    def run(self, first_step: int, updates: int = 1) -> list[Any]:
        return list(
            run_phases(
                [self.phase(0, 0, 2), self.phase(1, 2, 5)],
                first_step=first_step,
                prompts_per_step=2,
                updates_per_step=updates,
                collect=self.collect,
                advantages=minus_mean,
                keep=spread,
                trainer=self.trainer.parts(reference=False),
            )
        )


def test_every_step_of_every_phase_in_order() -> None:
    run = FakeRun()
    found = run.run(0)
    assert [(phase.index, report.step) for phase, report, _ in found] == [
        (0, 0),
        (0, 1),
        (1, 2),
        (1, 3),
        (1, 4),
    ]
    assert run.calls[:3] == [("draw", 0, 2), ("collect", 0), ("observe", 0, ["0:0", "0:1"])]
    assert [c[1] for c in run.calls if c[0] == "draw"] == [0, 0, 1, 1, 1]
    # one of two groups has a spread; its third sample has no verdict
    packs = [c for c in run.trainer.calls if c[0] == "pack"]
    assert packs == [("pack", 1)] * 5
    assert [len(g.responses) for g in run.trainer.packed] == [2] * 5
    updates = [c[1] for c in run.trainer.calls if c[0] == "update"]
    assert updates == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("first", "want"),
    [(1, [(0, 1), (1, 2), (1, 3), (1, 4)]), (3, [(1, 3), (1, 4)]), (2, [(1, 2), (1, 3), (1, 4)]),
     (5, [])],
)  # fmt: skip
def test_resume_goes_on_at_the_next_step(first: int, want: list[tuple[int, int]]) -> None:
    run = FakeRun()
    found = run.run(first)
    assert [(phase.index, report.step) for phase, report, _ in found] == want
    assert [c[1] for c in run.calls if c[0] == "collect"] == [step for _, step in want]


def test_updates_are_numbered_through_the_run() -> None:
    run = FakeRun()
    run.run(3, updates=4)  # one kept group a step: one of the four updates happens
    assert [c[1] for c in run.trainer.calls if c[0] == "update"] == [12, 16]


def test_reports_hold_the_steps_metrics() -> None:
    phase, report, groups = FakeRun().run(4)[0]
    metrics = report.metrics
    assert phase.name == "phase 1"
    assert [g.prompt.uid for g in groups] == ["1:0", "1:1"]
    want = {
        "actor/pg_loss": 4.0,
        "curriculum/x": 1.5,
        "batch/groups": 2.0,
        "batch/kept_groups": 1.0,
        "critic/rewards/mean": 0.75,
        "critic/rewards/masked": 2.0,
    }
    assert {name: metrics[name] for name in want} == want
    step, gen, update = (metrics[f"timing_s/{n}"] for n in ("step", "gen", "update_actor"))
    assert step >= gen + update >= 0
    # two groups: a prompt of 3 and responses of 1, 2 and 3 tokens each
    assert metrics["perf/throughput"] * step == pytest.approx(18)


def test_a_step_is_only_taken_when_it_is_asked_for() -> None:
    """The caller saves and evaluates between steps: nothing may run ahead of it."""
    run = FakeRun()
    steps = run_phases(
        [run.phase(0, 0, 2)],
        first_step=0,
        prompts_per_step=1,
        updates_per_step=1,
        collect=run.collect,
        advantages=minus_mean,
        keep=spread,
        trainer=run.trainer.parts(reference=False),
    )
    assert run.calls == []
    next(steps)
    assert [c for c in run.calls if c[0] == "collect"] == [("collect", 0)]


def test_rollout_metrics_by_hand() -> None:
    groups = [scored(prompt("a", 3), 1.0, None), scored(prompt("b", 7), 0.0, finished=False)]
    assert rollout_metrics(groups) == pytest.approx(
        {
            "critic/rewards/mean": 0.5,
            "critic/rewards/max": 1.0,
            "critic/rewards/min": 0.0,
            "critic/rewards/masked": 1.0,
            "reward/rule/mean": 1 / 3,
            "reward/rule/no_answer": 1.0,
            "response_length/mean": 4 / 3,  # 1, 2, 1 tokens
            "response_length/max": 2.0,
            "response_length/min": 1.0,
            "response_length/clip_ratio": 1 / 3,
            "prompt_length/mean": 5.0,
            "prompt_length/max": 7.0,
            "batch/groups": 2.0,
        }
    )


def test_mean_reward_without_any_verdict_is_not_zero() -> None:
    metrics = rollout_metrics([scored(prompt("a"), None)])
    assert np.isnan(metrics["critic/rewards/mean"])
