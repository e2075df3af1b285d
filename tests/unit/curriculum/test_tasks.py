"""Task-balanced sampling: how often each task is drawn, and what cannot be."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_qlrl.config.schema import CurriculumConfig
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.curriculum.phase_pool import PhasePool
from megatron_qlrl.errors import CheckpointError, DataError
from megatron_qlrl.types import Prompt, Score, ScoredGroup

SIZES = {"docmath": 90, "hotpotqa": 9, "frames": 30}
"""Prompts of each data source: far from equal."""


def prompts_of(sizes=SIZES, num_tokens=5):
    return [
        Prompt(f"{source}-{num_tokens}:{i}", np.zeros(num_tokens, np.int32), source, "q", "a")
        for source, size in sizes.items()
        for i in range(size)
    ]


def make_pool(tasks, sizes=SIZES, seed=0):
    prompts = prompts_of(sizes)
    return PhasePool(prompts, phase=0, min_tokens=0, max_tokens=9, seed=seed, tasks=tasks)


def make_curriculum(tasks, *, sizes=SIZES, seed=0):
    prompts = prompts_of(sizes) + prompts_of(sizes, num_tokens=15)
    config = CurriculumConfig.model_validate({"tasks": tasks})
    return Curriculum(prompts, limits=(10, 20), seed=seed, config=config)


def sources(prompts):
    return Counter(prompt.data_source for prompt in prompts)


def test_equal_shares_however_many_prompts_there_are():
    """Chi-square of the counts of 100 draws of 12 against equal shares: 0. That of shares by
    number, which the data has (90, 9, 30 of 129), would be over 800."""
    pool = make_pool({"docmath": 1, "hotpot": 1, "frames": 1})
    drawn = Counter()
    for _ in range(100):
        batch = sources(pool.draw(12))
        assert set(batch.values()) == {4}
        drawn += batch
    expected = 400
    assert sum((drawn[source] - expected) ** 2 / expected for source in SIZES) == 0
    # 400 draws of its 9 hotpotqa prompts: each in every epoch.
    assert pool.orders["hotpot"].epoch == 400 // 9


@given(
    st.lists(st.integers(1, 20), min_size=2, max_size=6),
    st.lists(st.integers(1, 7), min_size=1, max_size=30),
)
def test_given_shares_hold_at_any_time(shares, draws):
    tasks = {f"task{k}": float(share) for k, share in enumerate(shares)}
    pool = make_pool(tasks, sizes=dict.fromkeys(tasks, 50))
    for n in draws:
        pool.draw(n)
        total = sum(pool.drawn.values())
        for task, share in tasks.items():
            exact = total * share / sum(shares)
            assert abs(pool.drawn[task] - exact) < len(tasks) / 2 + 1e-9


def test_tasks_alternate_within_a_draw():
    drawn = make_pool({"docmath": 2, "*": 1}).draw(6)
    assert [p.data_source == "docmath" for p in drawn] == [True, False, True, True, False, True]


def test_a_task_that_has_too_few_prompts_gives_all_it_has():
    pool = make_pool({"docmath": 1, "hotpot": 1, "frames": 1})
    drawn = pool.draw(60)
    assert sources(drawn) == {"hotpotqa": 9, "docmath": 26, "frames": 25}
    assert len({p.uid for p in drawn}) == 60
    # It catches up: the next twelve are its own as far as it has them.
    assert sources(pool.draw(12, taken=()))["hotpotqa"] == 9


def test_taken_prompts_are_not_drawn():
    pool = make_pool({"hotpot": 1, "*": 1})
    taken = {f"hotpotqa-5:{i}" for i in range(8)}
    drawn = pool.draw(10, taken)
    assert not taken & {p.uid for p in drawn}
    assert sources(drawn)["hotpotqa"] == 1


def test_orders_of_tasks_differ():
    """Rows of two tasks about the same documents must not meet in every epoch."""
    pool = make_pool({"a": 1, "b": 1}, sizes={"a": 20, "b": 20})
    drawn = pool.draw(40)
    numbers = {
        source: [p.uid.split(":")[1] for p in drawn if p.data_source == source] for source in "ab"
    }
    assert sorted(numbers["a"]) == sorted(numbers["b"])
    assert numbers["a"] != numbers["b"]


@pytest.mark.parametrize("steps_before", [0, 1, 7])
def test_resumes_exactly(steps_before):
    tasks = {"hotpot": 3, "docmath": 1, "*": 2}
    ours, theirs = make_pool(tasks), make_pool(tasks)
    for _ in range(steps_before):
        ours.draw(5, taken={"docmath-5:1"})
    theirs.load_state_dict(json.loads(json.dumps(ours.state_dict())))
    for _ in range(9):
        assert [p.uid for p in ours.draw(5)] == [p.uid for p in theirs.draw(5)]


def test_carried_prompts_count_in_the_shares_of_their_tasks():
    curriculum = make_curriculum({"docmath": 1, "hotpot": 1, "frames": 1})
    seen = [p for p in curriculum.prompts.values() if p.num_tokens == 5]
    unsolved = [p for p in seen if p.data_source == "frames"][:20]
    groups = [ScoredGroup(p, (), (Score(0.0, 0.0), Score(0.0, 0.0))) for p in unsolved]
    curriculum.observe(0, 0, groups)
    for _ in range(10):
        drawn = curriculum.draw(1, 12, max_carried=3)
        assert sum(p.num_tokens == 5 for p in drawn) == 3
        assert sources(drawn) == {"docmath": 4, "hotpotqa": 4, "frames": 4}


def test_a_phase_without_a_task_divides_among_the_others():
    prompts = prompts_of() + prompts_of({"docmath": 20, "frames": 20}, num_tokens=15)
    config = CurriculumConfig.model_validate({"tasks": {"docmath": 1, "hotpot": 1, "frames": 1}})
    curriculum = Curriculum(prompts, limits=(10, 20), seed=0, config=config)
    assert sources(curriculum.draw(1, 12)) == {"docmath": 6, "frames": 6}
    (line,) = curriculum.absent_tasks()
    assert line.startswith("phase 1 has no prompt of hotpot (curriculum.tasks)")
    assert make_curriculum({"hotpot": 1, "*": 1}).absent_tasks() == []
    assert make_curriculum({}).absent_tasks() == []


def test_metrics_count_each_task():
    curriculum = make_curriculum({"hotpot": 1, "*": 1})
    curriculum.draw(0, 20)
    metrics = curriculum.metrics(0)
    assert metrics["curriculum/task/hotpot/drawn"] == 9
    assert metrics["curriculum/task/*/drawn"] == 11
    assert metrics["curriculum/task/hotpot/epoch"] == 0
    assert not any("task" in name for name in make_curriculum({}).metrics(0))


def test_a_prompt_without_a_task_is_named():
    with pytest.raises(DataError, match=r"'frames' belongs to no task.*docmath, hotpot"):
        make_curriculum({"docmath": 1, "hotpot": 1})


def test_a_task_without_a_prompt_is_named():
    """Also one whose prompts a longer name takes."""
    with pytest.raises(DataError, match=r"task 'docmeth'.*docmath, frames, hotpotqa"):
        make_curriculum({"docmeth": 1, "*": 1})
    with pytest.raises(DataError, match="task 'docmath'"):
        make_curriculum({"docmath": 1, "docmath_": 1, "*": 1}, sizes={"docmath_2": 9, "x": 3})


def test_the_longest_name_counts_in_any_case_and_order():
    sizes = {"docmath": 6, "docmath_hard": 6, "other": 6}
    tasks = {"*": 1, "Doc": 1, "docmath_h": 1}
    pool = make_pool(tasks, sizes=sizes)
    assert sources(pool.draw(6)) == {"docmath": 2, "docmath_hard": 2, "other": 2}
    again = make_pool(dict(reversed(tasks.items())), sizes=sizes)
    again.draw(6)
    assert [p.uid for p in pool.draw(9)] == [p.uid for p in again.draw(9)]


@pytest.mark.parametrize("other", [{}, {"docmath": 2, "*": 1}])
def test_other_tasks_do_not_resume(other):
    curriculum = make_curriculum({"docmath": 1, "*": 1})
    curriculum.draw(0, 3)
    state = json.loads(json.dumps(curriculum.state_dict()))
    with pytest.raises(CheckpointError, match="the saved data order is for"):
        make_curriculum(other).load_state_dict(state)
