"""Real child processes of a small module; each test starts two or three bare Pythons."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_qlrl.launch import local
from megatron_qlrl.launch.local import format_errors, launch, num_gpus

ROOT = Path(__file__).resolve().parents[3]
HEAD = """
import json, os, pathlib, signal, sys, time
from megatron_qlrl.launch.local import report_error
rank = int(os.environ["RANK"])
folder = pathlib.Path(sys.argv[1])
def seen(name):
    (folder / f"{name}_{rank}").touch()
def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.01)
"""

Run = Callable[[str, int], int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Launches the given body as ranks; it knows `rank`, `folder`, `seen` and `wait_for`."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    def start(body: str, processes: int) -> int:
        (tmp_path / "ranks_body.py").write_text(HEAD + body)
        return launch([str(tmp_path)], processes=processes, module="ranks_body")

    return start


def test_every_rank_gets_its_place(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    body = """
names = "LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
(folder / f"env_{rank}").write_text(json.dumps([os.environ[n] for n in names]))
"""
    assert run(body, 3) == 0
    found = [json.loads((tmp_path / f"env_{rank}").read_text()) for rank in range(3)]
    port = found[0][4]
    assert found == [[str(r), "3", "3", "127.0.0.1", port, "2"] for r in range(3)]


def test_threads_of_the_user_are_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    body = '(folder / f"omp_{rank}").write_text(os.environ["OMP_NUM_THREADS"])'
    assert run(body, 2) == 0
    assert [(tmp_path / f"omp_{r}").read_text() for r in (0, 1)] == ["5", "5"]


def test_only_rank_0_is_shown(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert run('print("hello from", rank)', 2) == 0
    assert capfd.readouterr().out == "hello from 0\n"


def test_a_failing_rank_ends_the_others(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
if rank == 1:
    wait_for("up_0")
    print("what went wrong")
    sys.exit(7)
seen("up")
time.sleep(600)
"""
    assert run(body, 2) == 7
    assert capfd.readouterr().err == "qlrl: rank 1 failed with exit code 7\n  what went wrong\n"


def test_a_killed_rank_gives_the_shells_code(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(600)", 2) == 137
    assert capfd.readouterr().err == "qlrl: rank 1 failed with exit code 137\n"


def test_error_of_all_ranks_is_shown_once(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    body = 'report_error("no such file; name another", rank); sys.exit(2)'
    assert run(body, 3) == 2
    assert capfd.readouterr().err == "qlrl: error: no such file; name another\n"


def test_error_of_one_rank_names_it_and_ends_the_others(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
if rank == 1:
    report_error("disk is full", rank)
    sys.exit(2)
time.sleep(600)
"""
    assert run(body, 2) == 2
    assert capfd.readouterr().err == "qlrl: error: rank 1: disk is full\n"


def test_rank_that_is_slow_to_leave_does_not_change_the_code_of_its_error(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.2)
    assert run('report_error("no such file", rank); time.sleep(600)', 2) == 2
    assert capfd.readouterr().err == "qlrl: error: no such file\n"


def test_rank_that_ignores_sigterm_is_killed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.2)
    body = """
if rank == 1:
    wait_for("deaf_0")
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
seen("deaf")
time.sleep(600)
"""
    assert run(body, 2) == 3


def _launcher(tmp_path: Path, body: str) -> "subprocess.Popen[bytes]":
    """`launch` in a process of its own, returned once both ranks are up; writes to err.txt."""
    (tmp_path / "ranks_body.py").write_text(HEAD + body)
    code = (
        "import sys; from megatron_qlrl.launch.local import launch;"
        f"sys.exit(launch([{str(tmp_path)!r}], processes=2, saves=True, "
        "module='ranks_body'))"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    with (tmp_path / "err.txt").open("wb") as err:
        process = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=err)
    _wait_until(lambda: all((tmp_path / f"up_{rank}").exists() for rank in (0, 1)))
    return process


def _wait_until(ready: Callable[[], bool]) -> None:
    for _ in range(3000):
        if ready():
            return
        time.sleep(0.01)
    pytest.fail("waited 30 s in vain")


@pytest.mark.parametrize(
    ("number", "handed_on", "code"),
    [(signal.SIGTERM, 15, 143), (signal.SIGUSR1, 10, 138), (signal.SIGINT, 15, 130)],
)
def test_signals_reach_every_rank_and_they_may_finish(
    tmp_path: Path, number: signal.Signals, handed_on: int, code: int
) -> None:
    body = """
def save(number, frame):
    (folder / f"saved_{rank}").write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
seen("up")
time.sleep(600)
"""
    process = _launcher(tmp_path, body)
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    saved = [(tmp_path / f"saved_{rank}").read_text() for rank in (0, 1)]
    assert saved == [str(handed_on)] * 2


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_ranks_that_stop_as_asked_give_their_own_code(
    tmp_path: Path, number: signal.Signals
) -> None:
    body = """
for n in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(n, lambda *_: sys.exit(85))
seen("up")
time.sleep(600)
"""
    process = _launcher(tmp_path, body)
    process.send_signal(number)
    assert process.wait(timeout=30) == 85


def test_a_rank_that_stopped_ends_no_other(run: Run, tmp_path: Path) -> None:
    body = """
if rank == 1:
    sys.exit(85)
time.sleep(1)
seen("wrote")
sys.exit(85)
"""
    assert run(body, 2) == 85
    assert (tmp_path / "wrote_0").exists()


def test_second_signal_ends_ranks_at_once(tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGTERM, lambda *_: seen("asked"))
seen("up")
while True:
    time.sleep(1)
"""
    process = _launcher(tmp_path, body)
    process.terminate()
    _wait_until(lambda: all((tmp_path / f"asked_{rank}").exists() for rank in (0, 1)))
    process.terminate()
    assert process.wait(timeout=30) == 143


def test_interrupt_is_answered_at_once_and_a_second_one_ends_the_ranks(tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGTERM, lambda *_: seen("asked"))
(folder / f"pid_{rank}").write_text(str(os.getpid()))
seen("up")
while True:
    time.sleep(1)
"""
    process = _launcher(tmp_path, body)
    answer = "qlrl: stopping after this step; Ctrl-C again ends at once\n"
    process.send_signal(signal.SIGINT)
    _wait_until(lambda: (tmp_path / "err.txt").read_text() == answer)
    _wait_until(lambda: all((tmp_path / f"asked_{rank}").exists() for rank in (0, 1)))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=2) == 130
    assert (tmp_path / "err.txt").read_text() == answer
    assert not any(_runs(int((tmp_path / f"pid_{rank}").read_text())) for rank in (0, 1))


def test_rank_that_does_not_listen_yet_ends_the_others(tmp_path: Path) -> None:
    body = """
if rank == 0:
    signal.signal(signal.SIGTERM, lambda *_: seen("asked"))
seen("up")
while True:
    time.sleep(1)
"""
    process = _launcher(tmp_path, body)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 130


def test_what_fails_while_the_ranks_stop_is_shown(tmp_path: Path) -> None:
    body = """
def fail(number, frame):
    report_error("disk is full", rank)
    sys.exit(2)
signal.signal(signal.SIGTERM, fail)
seen("up")
while True:
    time.sleep(1)
"""
    process = _launcher(tmp_path, body)
    process.terminate()
    assert process.wait(timeout=30) == 2
    assert (tmp_path / "err.txt").read_text() == "qlrl: error: disk is full\n"


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    body = """
(folder / f"pid_{rank}").write_text(str(os.getpid()))
seen("up")
time.sleep(600)
"""
    process = _launcher(tmp_path, body)
    process.kill()
    process.wait(timeout=30)
    pids = [int((tmp_path / f"pid_{rank}").read_text()) for rank in (0, 1)]
    _wait_until(lambda: not any(_runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    """A zombie, which nobody may have collected yet, does not run."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        ({0: "a", 1: "a"}, ["a"]),
        ({0: "a", 3: "b"}, ["a", "rank 3: b"]),
        ({1: "a", 2: "a"}, ["rank 1: a"]),
        # Already agreed between the ranks (parallel.collectives.on_all_ranks).
        ({0: "rank 2: a", 2: "rank 2: a"}, ["rank 2: a"]),
    ],
)
def test_format_errors(messages: dict[int, str], shown: list[str]) -> None:
    assert format_errors(messages) == shown


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, 3), ("0,2", 2), ("", 0), ("-1", 0), ("1,-1,2", 1), ("0,1,2,3", 3)],
)
def test_num_gpus(tmp_path: Path, visible: str | None, expected: int) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia12", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert num_gpus(environ, tmp_path) == expected
