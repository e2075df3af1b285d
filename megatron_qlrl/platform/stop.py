"""The job's wish that the run ends at its next step, told by a signal."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""SIGUSR1: the batch script, before its time is up. SIGTERM: a scheduler that takes the machine."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Inside it the signals end nothing; the callable says whether one has come (to this rank)."""
    found: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        found.append(number)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(found)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
