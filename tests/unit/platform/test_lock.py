"""Real files and, where one must die or live, real processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_qlrl.errors import ConfigError
from megatron_qlrl.platform import lock
from megatron_qlrl.platform.lock import Holder, take_lock

Start = Callable[[str], Any]

HEAD = """
import os, pathlib, sys, time
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.platform import lock
lock.HEARTBEAT_S, lock.POLL_S = 0.05, 0.01
base = pathlib.Path(sys.argv[1])
"""
HOLD = """
held = lock.take_lock(base, what="run.dir x")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "run" / "run.lock"


@pytest.fixture
def start(base: Path) -> Iterator[Start]:
    """Starts a Python program that knows `base`; it is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def run(program: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", HEAD + program, str(base)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[3],
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def _files(base: Path) -> list[str]:
    return sorted(p.name for p in base.parent.iterdir())


def _hold(start: Start) -> Any:
    process = start(HOLD)
    assert process.stdout.readline() == "held\n"
    return process


def test_lock_is_one_file_and_gone_at_the_end(base: Path) -> None:
    held = take_lock(base, what="x")
    assert _files(base) == ["run.lock.1"]
    assert json.loads((base.parent / "run.lock.1").read_text())["pid"] == os.getpid()
    held.close()
    assert _files(base) == []


def test_file_removed_by_hand_ends_nobody(base: Path, start: Start) -> None:
    process = _hold(start)
    base.with_name("run.lock.1").unlink()
    time.sleep(0.3)
    assert process.poll() is None


def test_second_run_is_told_who_is_there(base: Path, start: Start) -> None:
    process = _hold(start)
    with pytest.raises(ConfigError) as caught:
        take_lock(base, what="run.dir x")
    assert str(caught.value).startswith(
        f"run.dir x is in use by another run, process {process.pid} on {lock._me().host} (since "
    )
    assert "stop it, or name another place" in str(caught.value)
    assert _files(base) == ["run.lock.1"]


def test_killed_run_leaves_its_place_at_once(base: Path, start: Start) -> None:
    process = _hold(start)
    process.kill()
    process.wait()
    began = time.monotonic()
    take_lock(base, what="x").close()
    assert time.monotonic() - began < 5


def test_frozen_run_of_this_machine_keeps_its_place(
    base: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = _hold(start)
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(lock, "SILENCE_S", 0.0)
    with pytest.raises(ConfigError, match="in use"):
        take_lock(base, what="x")


def test_program_that_follows_by_exec_holds_it_on(base: Path, start: Start) -> None:
    process = start(
        "held = lock.take_lock(base, what='x')\n"
        "if len(sys.argv) == 2:\n"
        "    os.execv(sys.executable, [*sys.orig_argv, 'again'])\n"
        "print(sorted(p.name for p in base.parent.iterdir()), flush=True)\n"
        "time.sleep(600)\n"
    )
    assert process.stdout.readline() == "['run.lock.2']\n"
    with pytest.raises(ConfigError, match=f"process {process.pid} "):
        take_lock(base, what="x")


def test_of_several_that_take_over_one_wins(base: Path, start: Start) -> None:
    _write(base, 3, replace(lock._me(), pid=1, started=-1))
    program = (
        "while not base.with_name('go').exists(): time.sleep(0.001)\n"
        "try:\n"
        "    held = lock.take_lock(base, what='x')\n"
        "except ConfigError as error:\n"
        "    print('refused', flush=True)\n"
        "else:\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    processes = [start(program) for _ in range(4)]
    time.sleep(0.5)
    base.with_name("go").touch()
    told = sorted(p.stdout.readline() for p in processes)
    assert told == ["held\n", "refused\n", "refused\n", "refused\n"]
    assert len([n for n in _files(base) if n.startswith("run.lock")]) == 1


@pytest.mark.parametrize("removed", [False, True])
def test_run_that_was_taken_for_gone_ends(base: Path, start: Start, removed: bool) -> None:
    process = _hold(start)
    _write(base, 2, replace(lock._me(), pid=1))
    if removed:
        base.with_name("run.lock.1").unlink()
    _, err = process.communicate(timeout=10)
    assert process.returncode == 1
    assert err.startswith("qlrl: error: run.dir x was taken over by another run")


# --- another machine ---------------------------------------------------------------------


def _write(base: Path, number: int, holder: Holder, *, age_s: float = 0.0) -> Path:
    base.parent.mkdir(parents=True, exist_ok=True)
    path = base.with_name(f"{base.name}.{number}")
    path.write_text(json.dumps(asdict(holder)))
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def _far() -> Holder:
    return replace(lock._me(), host="node7", machine="another boot", pid=1)


def test_silent_run_of_another_machine_is_gone(base: Path) -> None:
    _write(base, 1, _far(), age_s=61)
    began = time.monotonic()
    take_lock(base, what="x").close()
    assert time.monotonic() - began < 5


def test_it_is_waited_for_until_it_has_been_silent_long_enough(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(base, 1, _far(), age_s=59.0)
    began = time.monotonic()
    take_lock(base, what="x").close()
    assert 0.1 < time.monotonic() - began < 30
    assert "x may be in use by process 1 on node7" in capsys.readouterr().out


def test_sign_of_life_from_another_machine(base: Path) -> None:
    path = _write(base, 1, _far(), age_s=30)
    beat = threading.Timer(0.3, os.utime, [path])
    beat.start()
    with pytest.raises(ConfigError, match="in use by another run, process 1 on node7"):
        take_lock(base, what="x")
    beat.join()
    assert path.exists()


def test_half_written_file_is_somebodys(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SILENCE_S", 0.4)
    path = base.with_name("run.lock.1")
    path.parent.mkdir()
    path.touch()
    began = time.monotonic()
    take_lock(base, what="x").close()
    assert time.monotonic() - began > 0.1


ME = Holder("here", "boot A", os.getpid(), 55, "812", 1, "now")


@pytest.mark.parametrize(
    ("holder", "gone"),
    [
        (ME, True),  # this process, before exec
        (replace(ME, pid=os.getppid(), started=-1), True),  # its pid is another's now
        (replace(ME, machine="boot B"), False),  # same start of the job: another step of it
        (replace(ME, machine="boot B", restarts=0), True),  # the job has come back
        (replace(ME, machine="boot B", restarts=0, job="813"), False),
        (replace(ME, machine="boot B", restarts=0, job=""), False),
        (None, False),
    ],
)
def test_is_gone(holder: Holder | None, gone: bool) -> None:
    assert lock._is_gone(holder, ME) is gone
    no_job = replace(ME, job="", machine="boot B", restarts=0)
    assert not lock._is_gone(no_job, replace(ME, job="", restarts=1))


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="run.dir y cannot be written"):
        take_lock(tmp_path / "file" / "run.lock", what="run.dir y")


def test_a_file_of_other_types_tells_no_holder(base: Path) -> None:
    assert lock._read(_write(base, 1, replace(lock._me(), pid="7"))) is None  # pyright: ignore
