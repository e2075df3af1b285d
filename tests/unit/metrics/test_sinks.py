import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_qlrl.config.schema import LoggingConfig
from megatron_qlrl.metrics.sinks import Tracker, console_line


def make(run_dir: Path, state: dict[str, Any] | None = None, **settings: Any) -> Tracker:
    config = LoggingConfig.model_validate(settings)
    return Tracker(run_dir, config=config, run_name="toy", resolved={"a": {"b": 1}}, state=state)


def record(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_record_is_on_disk_at_once_and_strict_json(tmp_path: Path) -> None:
    tracker = make(tmp_path / "new")
    tracker.log(1, {"actor/loss": 0.5, "bad": math.nan, "worse": math.inf, "n": np.float32(2)})
    assert record(tmp_path / "new") == [
        {"step": 1, "actor/loss": 0.5, "bad": None, "worse": None, "n": 2.0}
    ]
    tracker.close()


def test_resume_drops_later_steps(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    tracker.log(1, {"x": 1.0})
    tracker.log(2, {"x": 2.0})
    state = tracker.state_dict()
    tracker.log(3, {"x": 3.0})
    for step in (1, 2, 3):
        tracker.rollouts(step, [{"text": "é", "score": None}])
    # A crash in the middle of a write leaves half a line.
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "x"')
    resumed = make(tmp_path, state)
    resumed.log(3, {"x": 30.0})
    resumed.rollouts(3, [{"text": "again"}])
    assert record(tmp_path) == [
        {"step": 1, "x": 1.0},
        {"step": 2, "x": 2.0},
        {"step": 3, "x": 30.0},
    ]
    files = sorted(f.name for f in (tmp_path / "rollouts").iterdir())
    assert files == ["step_000001.jsonl", "step_000002.jsonl", "step_000003.jsonl"]
    assert json.loads((tmp_path / "rollouts" / files[0]).read_text()) == {
        "text": "é",
        "score": None,
    }
    assert json.loads((tmp_path / "rollouts" / files[2]).read_text()) == {"text": "again"}


def test_resume_drops_later_lines_of_the_same_step(tmp_path: Path) -> None:
    """An evaluation that each of two starts made up for, before either could save again."""
    tracker = make(tmp_path)
    tracker.log(0, {"val/x": 0.0})
    tracker.log(0, {"x": 1.0})
    state = tracker.state_dict()
    for _ in range(2):
        resumed = make(tmp_path, state)
        resumed.log(0, {"val/x": 0.5})
        assert resumed.state_dict()["lines"] == 3
    assert [sorted(line) for line in record(tmp_path)] == [["step", "val/x"], ["step", "x"]] + [
        ["step", "val/x"]
    ]


def test_new_run_moves_the_old_record_aside(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        make(tmp_path).log(1, {"x": value})
    assert record(tmp_path) == [{"step": 1, "x": 3.0}]
    older = [(tmp_path / f"metrics.jsonl.{n}").read_text() for n in (1, 2)]
    assert [json.loads(text)["x"] for text in older] == [1.0, 2.0]


def test_rollout_records_of_a_step_are_appended(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    tracker.rollouts(123, [{"uid": "a:0"}, {"uid": "a:1"}])
    tracker.rollouts(123, [{"uid": "a:2"}])
    lines = (tmp_path / "rollouts" / "step_000123.jsonl").read_text().splitlines()
    assert [json.loads(line)["uid"] for line in lines] == ["a:0", "a:1", "a:2"]


def test_silent_tracker_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker.silent()
    tracker.log(1, {"x": 1.0})
    tracker.rollouts(1, [{"x": 1}])
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
    assert tracker.state_dict() == {"step": 1, "lines": 1, "wandb_id": None}


def test_console_line() -> None:
    metrics = {"timing_s/step": 12.3456, "critic/rewards/mean": 0.53125, "other": 1.0, "val/x": 0.5}
    assert console_line(7, metrics) == "step 7  reward 0.5312  s 12.35  val/x 0.5"
    assert console_line(8, {"other": 1.0}) == "step 8  other 1"


def test_console_shows_a_line_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path).log(4, {"critic/rewards/mean": 0.25})
    assert capsys.readouterr().out == "step 4  reward 0.25\n"


def test_steps_do_not_go_backwards(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    tracker.log(2, {})
    with pytest.raises(AssertionError, match="step 1 after step 2"):
        tracker.log(1, {})


def test_tensorboard_hides_steps_that_are_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = make(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        first.log(step, {"actor/loss": float(step)})
    first.close()
    second = make(tmp_path, {"step": 2, "lines": 0, "wandb_id": None}, tensorboard=True)
    second.log(3, {"actor/loss": 30.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("actor/loss")] == [(1, 1), (2, 2), (3, 30)]
