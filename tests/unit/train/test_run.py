"""What is decided between steps, and in which order, with parts that note what is asked of them."""

from pathlib import Path
from typing import Any

import pytest

from megatron_qlrl.errors import CheckpointError, StabilityError, StopRequested
from megatron_qlrl.platform.progress import Progress
from megatron_qlrl.train.phases import Phase
from megatron_qlrl.train.run import Run

pytestmark = pytest.mark.usefixtures("lone_group")

FIRST = Phase(0, "short", 0, 3, next_reference=Path("references/phase_1"))
PHASES = [FIRST, Phase(1, "long", 3, 5)]


class FakeParts:
    """Recorder, evaluation, monitor, stop and checkpoint store in one."""

    demand: str | None = None
    reason = "step 1: gradient_spike"
    asked = ""
    save_failed = False
    exhausted = False
    best_step = 0

    def __init__(self) -> None:
        self.calls: list[Any] = []

    @property
    def store(self) -> "FakeParts":
        return self

    @property
    def ranking(self) -> "FakeParts":
        return self

    def keeps(self, steps_done: int) -> bool:
        return steps_done == self.best_step

    def failed(self) -> bool:
        return self.save_failed

    def wait(self) -> None:
        raise CheckpointError("the disk is full")

    def step_done(self) -> None:
        self.calls.append("step done")

    def between_steps(self, steps_left: int) -> str:
        self.calls.append(("left", steps_left))
        return self.asked

    def release(self, folder: Path) -> None:
        self.calls.append(("release", str(folder)))

    def save(self) -> None:
        self.calls.append("save")

    def before_training(self) -> None:
        self.calls.append("evaluate start")

    def after(self, steps_done: int, phase: str, *, last: bool) -> None:
        self.calls.append(("evaluate", steps_done, phase, last))


def make() -> tuple[Run, FakeParts]:
    parts: Any = FakeParts()
    quiet = Progress(lambda _: None)
    return Run(parts, parts, parts, parts, quiet, 5, 2, 3600.0, Path("unused")), parts


def test_steps_go_through_the_phases_from_where_the_run_is() -> None:
    run, _ = make()
    assert [(p.name, step) for p, step in run.steps(PHASES, 2)] == [
        ("short", 2),
        ("long", 3),
        ("long", 4),
    ]
    assert list(run.steps(PHASES, 5)) == []


def test_a_run_that_gains_nothing_any_more_ends_between_steps() -> None:
    run, parts = make()
    steps = iter(run.steps(PHASES, 0))
    assert next(steps)[1] == 0
    parts.exhausted = True
    assert list(steps) == []
    run.decide(FIRST, 0)  # is saved out of turn, so that a new start knows that it is over
    assert "save" in parts.calls


def test_the_best_step_is_saved_out_of_turn() -> None:
    run, parts = make()
    parts.best_step = 1
    run.decide(FIRST, 0)
    assert parts.calls == ["step done", ("evaluate", 1, "short", False), "save", ("left", 4)]


def test_order_after_a_phases_last_step() -> None:
    run, parts = make()
    run.decide(FIRST, 2)
    assert parts.calls == [
        "step done",
        ("release", "references/phase_1"),
        ("evaluate", 3, "short", True),
        "save",
        ("left", 2),
    ]


@pytest.mark.parametrize(("step", "saves"), [(0, False), (1, True)])
def test_order_within_a_phase(step: int, saves: bool) -> None:
    run, parts = make()
    run.decide(FIRST, step)
    want = ["step done", ("evaluate", step + 1, "short", False), "save", ("left", 4 - step)]
    assert parts.calls == [call for call in want if saves or call != "save"]


def test_an_unstable_run_stops_before_it_evaluates_but_after_its_release() -> None:
    run, parts = make()
    parts.demand = "stop"
    with pytest.raises(StabilityError, match="gradient_spike. The run is saved as it was"):
        run.decide(FIRST, 2)
    assert parts.calls == ["step done", ("release", "references/phase_1")]


def test_a_stop_that_was_asked_for_comes_last() -> None:
    run, parts = make()
    parts.asked = "asked to stop"
    with pytest.raises(StopRequested, match="asked to stop"):
        run.decide(FIRST, 1)
    assert parts.calls[-2:] == ["save", ("left", 3)]


def test_a_save_that_failed_meanwhile_ends_the_run() -> None:
    run, parts = make()
    parts.save_failed = True
    with pytest.raises(CheckpointError, match="the disk is full"):
        run.decide(FIRST, 0)


@pytest.mark.parametrize(
    ("steps_done", "calls"),
    [
        (0, ["evaluate start"]),
        (2, [("evaluate", 2, "short", False)]),
        (3, [("evaluate", 3, "short", True)]),
        (4, [("evaluate", 4, "long", False)]),
        (5, [("evaluate", 5, "long", True)]),
    ],
)
def test_a_start_evaluates_the_model_or_makes_up_for_what_was_cut(
    steps_done: int, calls: list[Any]
) -> None:
    run, parts = make()
    run.begin(PHASES, steps_done)
    assert parts.calls == [*calls, ("left", 5 - steps_done)]
