from pathlib import Path
from typing import Any

import pytest

from megatron_qlrl.config.schema import Config
from megatron_qlrl.train.phases import (
    fresh_steps,
    make_phases,
    phase_group_at,
    reference_folder,
)


def make_config(*changes: dict[str, Any]) -> Config:
    """Phases of 2, 3, 4 ... steps up to 100, 200, 300 ... tokens."""
    phases = [
        {"name": f"p{k}", "max_input_tokens": 100 * (k + 1), "steps": k + 2, **change}
        for k, change in enumerate(changes)
    ]
    return Config.model_validate({"model": {"path": "m"}, "run": {"dir": "r"}, "phases": phases})


CP2 = {"overrides": {"policy": {"cp": 2}}}


def test_phases_follow_each_other() -> None:
    phases = make_phases(make_config({}, {}, {}))
    assert [(p.index, p.first_step, p.end_step) for p in phases] == [
        (0, 0, 2),
        (1, 2, 5),
        (2, 5, 9),
    ]


@pytest.mark.parametrize("step", [0, 1, 2, 5, 8, 9])
def test_phases_alike_are_one_group(step: int) -> None:
    group = phase_group_at(make_config({}, {}, {}), step)
    assert [p.index for p in group.phases] == [0, 1, 2]
    assert group.is_last
    assert group.config.max_input_tokens == 300


@pytest.mark.parametrize(
    "anew", [CP2, {"reference": "renew"}, {"optimizer_state": "reset"}], ids=lambda v: str(*v)
)
@pytest.mark.parametrize(
    ("step", "want", "is_last"),
    [
        (0, [0], False),
        (1, [0], False),
        (2, [1], False),
        (4, [1], False),
        (5, [2], True),
        (9, [2], True),
    ],
)
def test_a_change_starts_a_group_at_its_first_step(
    anew: dict[str, Any], step: int, want: list[int], is_last: bool
) -> None:
    third = {"overrides": {"rollout": {"group_size": 4}}}
    group = phase_group_at(make_config({}, anew, third), step)
    assert [p.index for p in group.phases] == want
    assert group.is_last == is_last
    assert group.config.max_input_tokens == 100 * (want[0] + 1)
    assert group.config.policy.cp == (2 if want == [1] and anew is CP2 else 1)
    assert group.config.rollout.group_size == (4 if want == [2] else 8)


def test_equal_overrides_share_a_group() -> None:
    config = make_config({}, CP2, CP2)
    assert [p.index for p in phase_group_at(config, 3).phases] == [1, 2]
    assert phase_group_at(config, 3).config.policy.cp == 2


def test_reference_is_of_the_newest_phase_that_renewed_it() -> None:
    config = make_config({"reference": "renew"}, {}, {"reference": "renew"}, {})
    folders = [reference_folder(config, k) for k in range(4)]
    own = Path("r/references/phase_2")
    assert folders == [Path("m"), Path("m"), own, own]
    # Without a parent the first phase starts from model.path in any case; there is no fifth.
    assert [p.next_reference for p in make_phases(config)] == [None, own, None, None]


def test_optimizer_starts_anew_at_the_start_of_the_phases_that_say_so() -> None:
    reset = {"optimizer_state": "reset"}
    assert fresh_steps(make_config({}, reset, {}, reset)) == {2, 9}
    assert fresh_steps(make_config({}, {})) == frozenset()


def test_a_run_with_a_parent_starts_from_a_reference_of_its_own() -> None:
    config = make_config({}, {}, {"reference": "renew"})
    run = config.run.model_copy(update={"parent": "other:4"})
    child = config.model_copy(update={"run": run})
    first = Path("r/references/phase_0")
    assert [reference_folder(child, k) for k in range(3)] == [
        first,
        first,
        Path("r/references/phase_2"),
    ]
    assert [p.next_reference for p in make_phases(child)] == [
        p.next_reference for p in make_phases(config)
    ]
    assert [p.index for p in phase_group_at(child, 0).phases] == [0, 1]
