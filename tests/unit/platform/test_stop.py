"""Real signals to this process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_qlrl.platform.stop import StopSignals, interrupt_ends


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_is_noted_and_ends_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals(None) as stop:
        assert stop.between_steps(2) == ""
        os.kill(os.getpid(), number)
        assert stop.between_steps(1) == stop.between_steps(0) == "asked to stop"
    assert signal.getsignal(number) == before


def test_wish_belongs_to_one_run() -> None:
    with StopSignals(None):
        os.kill(os.getpid(), signal.SIGUSR1)
    with StopSignals(None) as stop:
        assert stop.between_steps(1) == ""


def test_step_is_given_up_unless_it_is_the_first() -> None:
    with StopSignals(None) as stop:
        stop.between_steps(2)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.within_step() == ""
    with StopSignals(None) as stop:
        stop.between_steps(3)
        stop.between_steps(2)
        assert stop.within_step() == ""
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.within_step() == "asked to stop"


def test_time_that_does_not_suffice_for_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 1200.0, 1300.0, 1339.0, 1341.0, 1342.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    with StopSignals(ends_at=1700.0) as stop:
        asked = stop.between_steps
        # The longest step took 200 s: another is begun up to 1700 - 1.5 * 200 - 60 = 1340.
        assert [asked(9) for _ in range(4)] == ["", "", "", ""]
        assert asked(9) == "the job's time is up in 359 s, too soon for another step"
        assert asked(0) == ""  # nothing is left but to end


def test_what_follows_a_step_can_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 1200.0, 1500.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    with StopSignals(None) as stop:
        stop.between_steps(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.within_step() == ""
        stop.step_done()
        assert stop.within_step() == "asked to stop"
        assert stop.longest_s == 200.0
        stop.between_steps(0)  # 300 s with the evaluation
        assert stop.longest_s == 500.0


def test_step_of_the_process_before_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    with StopSignals(ends_at=1359.0, longest_s=200.0) as stop:  # 1.5 * 200 + 60 s are needed
        assert stop.between_steps(9) != ""
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.within_step() == "asked to stop"
    with StopSignals(ends_at=1361.0, longest_s=200.0) as stop:
        assert stop.between_steps(9) == ""
        assert stop.longest_s == 200.0


def test_first_step_is_always_begun() -> None:
    with StopSignals(ends_at=time.time() + 1) as stop:
        assert stop.between_steps(9) == ""
        assert stop.between_steps(8) != ""


INTERRUPTED = """
import os, signal, time
from megatron_qlrl.platform.stop import StopSignals, interrupt_ends

interrupt_ends()
with StopSignals(None) as stop:
    print("up", flush=True)
    while not stop.between_steps(1):
        time.sleep(0.01)
    print(stop.between_steps(1), flush=True)
    sum(range(10**12))  # one call of C code: no handler of Python's gets its turn
"""


def test_first_interrupt_asks_and_the_second_ends_at_once() -> None:
    process = _start(INTERRUPTED)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked to stop\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT  # 130 in a shell
    assert err == "qlrl: stopping after this step; Ctrl-C again ends at once\n"


def test_interrupt_outside_a_run_ends_without_a_stack_trace() -> None:
    process = _start(
        "from megatron_qlrl.platform.stop import interrupt_ends\n"
        "interrupt_ends(); print('up', flush=True); sum(range(10**12))"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (-signal.SIGINT, "")


def test_interrupts_that_a_shell_has_turned_off_stay_off() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt_ends()
        with StopSignals(None) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.between_steps(1) == ""
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def _start(program: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
    )
