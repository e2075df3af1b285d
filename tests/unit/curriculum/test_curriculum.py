import json

import numpy as np
import pytest

from megatron_qlrl.config.schema import CurriculumConfig
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.curriculum.retrospective import Seen
from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.types import Prompt, Score, ScoredGroup

SHORT = [f"short:{i}" for i in range(4)]
LONG = [f"long:{i}" for i in range(6)]


def make_curriculum(*, seed=0, limits=(10, 20), num_long=6, solved_above=0.0):
    sizes = {uid: 5 for uid in SHORT} | {uid: 15 for uid in LONG[:num_long]}
    prompts = [Prompt(uid, np.zeros(n, np.int32), "s", "q", "a") for uid, n in sizes.items()]
    config = CurriculumConfig.model_validate({})
    return Curriculum(prompts, limits=limits, seed=seed, config=config, solved_above=solved_above)


def make_group(curriculum, uid, values):
    return ScoredGroup(
        curriculum.prompts[uid], (), tuple(Score(value=v, rule=v or 0.0) for v in values)
    )


def after_phase_0(**kwargs):
    """Three of the four short prompts were seen."""
    curriculum = make_curriculum(**kwargs)
    values = {"short:0": [0.0, 0.0], "short:1": [1.0, 0.0], "short:2": [1.0, 1.0]}
    groups = [make_group(curriculum, uid, v) for uid, v in values.items()]
    curriculum.observe(0, 0, groups)
    return curriculum


def uids(prompts):
    return [p.uid for p in prompts]


def test_a_phase_sees_its_own_lengths_alone_unless_prompts_are_carried():
    curriculum = after_phase_0()
    assert sorted(uids(curriculum.draw(0, 9))) == SHORT
    assert sorted(uids(curriculum.draw(1, 9))) == LONG


def test_carried_prompts_are_bounded_seen_and_spread():
    for draw in range(30):
        curriculum = after_phase_0(seed=draw)
        drawn = uids(curriculum.draw(1, 6, max_carried=2))
        carried = [i for i, uid in enumerate(drawn) if uid in SHORT]
        assert len(drawn) == len(set(drawn)) == 6
        assert len(carried) == 2
        assert carried == [0, 3]
        assert "short:3" not in drawn  # never seen: nothing is known of its difficulty


def test_taken_prompts_count_in_the_bound():
    curriculum = after_phase_0()
    taken = ["short:0", "long:0", "long:1"]
    drawn = uids(curriculum.draw(1, 4, max_carried=2, taken=taken))
    assert not set(drawn) & set(taken)
    assert sum(uid in SHORT for uid in drawn) == 1
    full = uids(curriculum.draw(1, 4, max_carried=1, taken=taken))
    assert not set(full) & set(SHORT)


def test_a_pool_that_is_too_small_shrinks_the_batch():
    curriculum = after_phase_0(num_long=2)
    drawn = uids(curriculum.draw(1, 8, max_carried=2))
    assert sorted(drawn)[:2] == ["long:0", "long:1"]
    assert len(drawn) == 4


def test_counts_by_phase_and_source():
    curriculum = after_phase_0()
    groups = [
        make_group(curriculum, uid, values)
        for uid, values in {
            "short:0": [0.0, 0.0],
            "long:0": [0.0, 1.0],
            "long:1": [None, 0.0],
            "long:2": [1.0, 1.0],
        }.items()
    ]
    curriculum.observe(1, 1, groups)
    curriculum.reached(1, groups[1:2])
    assert curriculum.metrics(1) == {
        "curriculum/phase": 1.0,
        "curriculum/pool_prompts": 6.0,
        "curriculum/epoch": 0.0,
        "curriculum/seen_prompts": 3.0,
        "curriculum/seen_rewards/mean": 0.5,
        "curriculum/zero_reward_prompts": 1.0,
        "curriculum/new/drawn": 3.0,
        "curriculum/new/solved": 2.0,
        "curriculum/new/reached": 1.0,
        "curriculum/carried/drawn": 1.0,
        "curriculum/carried/solved": 0.0,
        "curriculum/carried/reached": 0.0,
    }
    assert curriculum.metrics(0)["curriculum/new/drawn"] == 3.0
    assert "curriculum/seen_rewards/mean" not in make_curriculum().metrics(0)


@pytest.mark.parametrize(("above", "solved"), [(0.0, 2.0), (0.3, 1.0), (0.7, 0.0)])
def test_a_prompt_is_solved_above_the_threshold(above, solved):
    curriculum = make_curriculum(solved_above=above)
    values = {"short:0": [0.3, 0.1], "short:1": [0.7, None, 0.0], "short:2": [0.0, None]}
    curriculum.observe(0, 0, [make_group(curriculum, uid, own) for uid, own in values.items()])
    assert curriculum.metrics(0)["curriculum/new/solved"] == solved
    # 0.2, 0.35 and 0: whatever solves a prompt, its mean is that of its verdicts.
    assert curriculum.metrics(0)["curriculum/seen_rewards/mean"] == pytest.approx(0.55 / 3)


@pytest.mark.parametrize("cut", [0, 3, 7])
def test_a_stopped_curriculum_goes_on_with_the_same_draws(cut):
    def step(curriculum, number):
        phase = int(number >= 3)
        drawn = curriculum.draw(phase, 3, max_carried=1)
        solved = [float((number + i) % 3 == 0) for i in range(3)]
        groups = [
            make_group(curriculum, p.uid, [0.0, s]) for p, s in zip(drawn, solved, strict=False)
        ]
        curriculum.observe(phase, number, groups)
        return uids(drawn)

    whole = make_curriculum()
    expected = [step(whole, n) for n in range(12)]
    assert sum(uid in SHORT for draw in expected[3:] for uid in draw) == 9
    stopped = make_curriculum()
    for n in range(cut):
        step(stopped, n)
    state = json.loads(json.dumps(stopped.state_dict()))
    step(stopped, cut)
    resumed = make_curriculum()
    resumed.load_state_dict(state)
    assert [step(resumed, n) for n in range(cut, 12)] == expected[cut:]
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize("other", [{"seed": 1}, {"limits": (10, 30)}, {"num_long": 5}])
def test_a_state_of_another_run_is_refused(other):
    begun = make_curriculum()
    begun.draw(1, 2)
    with pytest.raises(CheckpointError, match="resume with the same data files"):
        make_curriculum(**other).load_state_dict(begun.state_dict())


@pytest.mark.parametrize("other", [{"limits": (10, 30)}, {"limits": (10,)}, {"num_long": 5}])
def test_phases_that_have_not_begun_may_change(other):
    begun = make_curriculum()
    first = begun.draw(0, 3)
    resumed = make_curriculum(**other)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert {p.uid for p in [*first, *resumed.draw(0, 1)]} == set(SHORT)


def test_a_state_with_unknown_prompts_is_refused():
    begun = make_curriculum()
    begun.draw(1, 2)
    state = begun.state_dict()
    state["phases"][1]["queue"] = ["g:7"]
    with pytest.raises(CheckpointError, match="'g:7'"):
        make_curriculum().load_state_dict(state)


def test_a_child_knows_what_its_parent_has_seen_of_its_own_prompts():
    parent = after_phase_0()
    parent.observe(1, 3, [make_group(parent, "long:0", [0.0, 1.0])])
    state = json.loads(json.dumps(parent.state_dict()))
    # One phase less, and two long prompts are gone: its only phase takes the short ones.
    child = make_curriculum(seed=9, limits=(10,), num_long=0)
    assert child.inherit(state) == 3
    assert child.metrics(0)["curriculum/seen_prompts"] == 3.0
    assert child.metrics(0)["curriculum/new/drawn"] == 0.0
    assert child.metrics(0)["curriculum/seen_rewards/mean"] == 0.5  # 0, 1/2 and 1
    # Other phases: all prompts up to 12 tokens, then the longer ones.
    child = make_curriculum(seed=9, limits=(12, 30))
    assert child.inherit(state) == 4
    carried = set(uids(child.draw(1, 6, max_carried=2))) & set(SHORT)
    assert len(carried) == 2 and "short:3" not in carried
    assert child._carried.seen["short:1"] == Seen(1, 0.5, -1, -1, 1.0)
    child.observe(1, 0, [make_group(child, "short:1", [0.0, 0.0])])
    assert child._carried.seen["short:1"] == Seen(2, 0.0, 0, 1, 0.0)


def test_a_child_that_was_stopped_goes_on_with_prompts_of_phases_to_come():
    """What it has from its parent says nothing of phases that it has begun itself."""
    parent = after_phase_0()
    parent.observe(1, 3, [make_group(parent, uid, [0.0, 1.0]) for uid in LONG])

    def started():
        child = make_curriculum()
        child.inherit(parent.state_dict())
        child.draw(0, 2)
        child.observe(0, 0, [make_group(child, "short:0", [1.0, 1.0])])
        return child

    state = json.loads(json.dumps(started().state_dict()))
    resumed = make_curriculum()
    resumed.load_state_dict(state)
    expected = started()
    for phase in (0, 1):
        draws = [uids(c.draw(phase, 3, max_carried=2)) for c in (resumed, expected)]
        assert draws[0] == draws[1]
    assert resumed.state_dict() == expected.state_dict()
    # A phase to come may be changed; most of its prompts are gone here.
    changed = make_curriculum(num_long=2)
    changed.load_state_dict(state)
    assert sorted(uids(changed.draw(1, 6))) == LONG[:2]
