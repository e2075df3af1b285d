"""Real signals to this process."""

import os
import signal
import time

import pytest

from megatron_qlrl.platform.stop import stop_signals


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_is_noted_and_ends_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals(None) as asked:
        assert asked(2) == ""
        os.kill(os.getpid(), number)
        assert asked(1) == asked(0) == "asked to stop"
    assert signal.getsignal(number) == before


def test_wish_belongs_to_one_run() -> None:
    with stop_signals(None):
        os.kill(os.getpid(), signal.SIGUSR1)
    with stop_signals(None) as asked:
        assert asked(1) == ""


def test_time_that_does_not_suffice_for_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 1200.0, 1300.0, 1339.0, 1341.0, 1342.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    with stop_signals(ends_at=1700.0) as asked:
        # The longest step took 200 s: another is begun up to 1700 - 1.5 * 200 - 60 = 1340.
        assert [asked(9) for _ in range(4)] == ["", "", "", ""]
        assert asked(9) == "the job's time is up in 359 s, too soon for another step"
        assert asked(0) == ""  # nothing is left but to end


def test_first_step_is_always_begun() -> None:
    with stop_signals(ends_at=time.time() + 1) as asked:
        assert asked(9) == ""
        assert asked(8) != ""
