"""Why a run should end after this step: the job said so by a signal, or its time will be up."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""SIGUSR1: the batch script, before its time is up. SIGTERM: a scheduler that takes the machine."""
SLACK, RESERVE_S = 1.5, 60.0
"""Another step is begun if the job's time suffices for SLACK times the longest step so far, and
RESERVE_S for the rest of a checkpoint."""


@contextmanager
def stop_signals(ends_at: float | None) -> Iterator[Callable[[int], str]]:
    """Inside it the signals end nothing. The callable, asked before the first step and after every
    one with the number of steps that are left, gives the reason to stop that this rank knows of,
    or "".

    `ends_at`: when the job's time is up, in seconds since the epoch; None: nobody knows. Steps
    at long context take longer than the warning that jobs get by default.
    """
    found: list[int] = []
    last, longest = 0.0, 0.0

    def note(number: int, _: FrameType | None) -> None:
        found.append(number)

    def asked(steps_left: int) -> str:
        nonlocal last, longest
        now = time.time()
        last, longest = now, max(longest, now - last) if last else 0.0
        if found:
            return "asked to stop"
        if ends_at is not None and steps_left and now + SLACK * longest + RESERVE_S > ends_at:
            return f"the job's time is up in {ends_at - now:.0f} s, too soon for another step"
        return ""

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
