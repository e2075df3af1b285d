"""Why a run should end after this step: the job said so by a signal, or its time will be up."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""SIGUSR1: the batch script, before its time is up. SIGTERM: a scheduler that takes the machine."""
SLACK, RESERVE_S = 1.5, 60.0
"""Another step is begun if the job's time suffices for SLACK times the longest step so far, and
RESERVE_S for the rest of a checkpoint. The first is always begun: a job that came back only to give
up again would do so for ever."""


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
        left_s = inf if ends_at is None else ends_at - now
        if longest and steps_left and left_s < SLACK * longest + RESERVE_S:
            return f"the job's time is up in {left_s:.0f} s, too soon for another step"
        return ""

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
