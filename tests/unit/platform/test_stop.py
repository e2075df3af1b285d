"""Real signals to this process."""

import os
import signal

import pytest

from megatron_qlrl.platform.stop import stop_signals


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_is_noted_and_ends_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
    assert signal.getsignal(number) == before


def test_wish_belongs_to_one_run() -> None:
    with stop_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
    with stop_signals() as asked:
        assert not asked()
