"""Why a run should end now: the job said so by a signal, or its time will be up."""

import signal
import time
from math import inf
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""SIGUSR1: the batch script, before its time is up. SIGTERM: a scheduler that takes the machine."""
SLACK, RESERVE_S = 1.5, 60.0
"""Another step is begun if the job's time suffices for SLACK times the longest step so far, and
RESERVE_S for the rest of a checkpoint. The first of a job is begun whatever time is left, and ended
once it is begun: a job that came back only to give up again would do so for ever."""


class StopSignals:
    """Inside it (a context manager) the signals end nothing; they are noted, for this rank.

    Args:
        ends_at: when the job's time is up, in seconds since the epoch; None: nobody knows. Steps at
            long context take longer than the warning that jobs get by default.
        longest_s: what the longest step took that the job has done before; 0: it has done none.
    """

    def __init__(self, ends_at: float | None, *, longest_s: float = 0.0) -> None:
        self.longest_s = longest_s
        self._ends_at = ends_at
        self._found = False
        self._last = 0.0

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        # What came before, to the process that this one replaced, is delivered now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._found = True

    def between_steps(self, steps_left: int) -> str:
        """The reason to stop, or "". To be asked before the first step and after every one, with
        the number of steps that are left."""
        now = time.time()
        self.longest_s = max(self.longest_s, now - self._last if self._last else 0.0)
        self._last = now
        if self._found:
            return "asked to stop"
        left_s = inf if self._ends_at is None else self._ends_at - now
        if self.longest_s and steps_left and left_s < SLACK * self.longest_s + RESERVE_S:
            return f"the job's time is up in {left_s:.0f} s, too soon for another step"
        return ""

    def step_done(self) -> None:
        """What follows, up to the next `between_steps`, can be given up."""
        self.longest_s = max(self.longest_s, time.time() - self._last)

    def within_step(self) -> str:
        """The reason to give up the step that goes on, or ""; the run is then what it was before
        it."""
        return "asked to stop" if self._found and self.longest_s else ""
