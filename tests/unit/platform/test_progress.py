"""A start is never silent for long; other packages' messages lie in a file."""

import logging
import sys
import time
from pathlib import Path

import pytest

from megatron_qlrl.errors import ConfigError
from megatron_qlrl.platform.progress import Progress, Tally, foreign_messages_in


def wait_for(lines: list[str], number: int) -> None:
    deadline = time.monotonic() + 30
    while len(lines) < number and time.monotonic() < deadline:
        time.sleep(0.005)


def test_what_goes_on_is_said_again_until_it_ends() -> None:
    lines: list[str] = []
    progress = Progress(lines.append, every_s=0.02)
    with progress.doing("loading weights"):
        wait_for(lines, 3)
    said = len(lines)
    time.sleep(0.1)
    assert lines[:3] == [
        "loading weights",
        "still loading weights (0 s)",
        "still loading weights (0 s)",
    ]
    assert len(lines) == said


def test_the_inner_one_is_said_and_then_the_outer_one_again() -> None:
    lines: list[str] = []
    progress = Progress(lines.append, every_s=0.02)
    with progress.doing("first step"):
        with progress.doing("starting the engine"):
            wait_for(lines, 3)
            inner = list(lines)
        wait_for(lines, len(inner) + 2)
    assert inner[:3] == ["first step", "starting the engine", "still starting the engine (0 s)"]
    assert lines[-1] == "still first step (0 s)"


def test_something_goes_on_during_the_first_step_alone() -> None:
    lines: list[str] = []
    progress = Progress(lines.append)
    seen = []
    for step in progress.during_first("abc", "first step"):
        seen.append((step, list(lines), len(progress._stack)))
    assert seen == [
        ("a", ["first step"], 1),
        ("b", ["first step"], 0),
        ("c", ["first step"], 0),
    ]
    assert list(progress.during_first([], "first step")) == []
    assert lines == ["first step"]


def test_an_error_during_the_first_step_ends_it() -> None:
    progress = Progress(lambda _: None)

    def loop() -> None:
        for _ in progress.during_first("ab", "first step"):
            raise KeyError("x")

    with pytest.raises(KeyError):
        loop()
    assert progress._stack == []


def test_warnings_and_logs_of_others_go_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "logs" / "rank_0.log"
    with pytest.raises(ValueError), foreign_messages_in(file):
        print("too old", file=sys.stderr)
        logger = logging.getLogger("foreign_test")
        logger.addHandler(logging.StreamHandler())
        logger.propagate = False
        logger.warning("not found")
        raise ValueError
    logger.warning("later")  # its handler keeps the file
    print("ours", file=sys.stderr)
    assert capsys.readouterr().err == "ours\n"
    text = file.read_text()
    assert text == "too old\nnot found\nlater\n"


def test_a_file_in_the_folders_place_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(ConfigError, match="logs"), foreign_messages_in(tmp_path / "logs" / "x"):
        pass


def test_tally_says_what_is_left_at_the_speed_so_far() -> None:
    now = [100.0]
    tally = Tally("answers", clock=lambda: now[0])
    tally.total, tally.known = 50, 10
    assert str(tally) == "10 of 50 answers"
    now[0], tally.done = 160.0, 30  # 2 s each, and 10 are left
    assert str(tally) == "40 of 50 answers, about 20 s left"
    tally.total = 240  # 200 left
    assert str(tally) == "40 of 240 answers, about 7 min left"
    tally.total = 40 + 5400  # 10,800 s
    assert str(tally) == "40 of 5440 answers, about 3.0 h left"
    tally.total = 40
    assert str(tally) == "40 of 40 answers"
    tally.start()
    assert str(tally) == "0 of 0 answers"


def test_what_goes_on_says_how_far_it_is() -> None:
    lines: list[str] = []
    tally = Tally("answers")
    tally.total = 3
    with Progress(lines.append, every_s=0.02).doing("asking", tally):
        wait_for(lines, 2)
    assert lines[:2] == ["asking", "still asking (0 s; 0 of 3 answers)"]
