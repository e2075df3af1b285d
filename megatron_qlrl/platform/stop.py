"""Decides when a run should end early: a signal asks for it, or the job's time runs out."""

import os
import signal
import time
from math import inf
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""The batch script sends SIGUSR1 before its time is up; a scheduler that takes the machine sends
SIGTERM. Where a run can be saved, SIGINT (Ctrl-C) asks to stop, too."""
STOPPING = "qlrl: stopping after this step; Ctrl-C again ends at once"
SLACK, RESERVE_S = 1.5, 60.0
"""Another step begins if the job's time suffices for SLACK times the longest step so far and
RESERVE_S for the rest of a checkpoint. The first step of a job begins whatever time is left and
runs to its end, because a job that came back only to give up again would do so for ever."""


def interrupt_ends() -> None:
    """Makes Ctrl-C end this process like other programs: at once, even in the middle of C code, and
    without a stack trace. A process that a shell started to ignore Ctrl-C still ignores it."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def heard_signals() -> tuple[signal.Signals, ...]:
    """Returns the signals that ask to stop; Ctrl-C is none where a shell made us ignore it."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    return STOP_SIGNALS if ignored else (*STOP_SIGNALS, signal.SIGINT)


class StopSignals:
    """A context manager in which the signals do not end this rank's process; they are noted. A
    second Ctrl-C ends the process.

    Args:
        ends_at: when the job's time is up, in seconds since the epoch; None if nobody knows. A step
            at long context takes longer than the warning that jobs get by default.
        longest_s: seconds of the longest step that this job has done before; 0 if it has done none.
        speaks: this rank answers Ctrl-C with a line on stderr.
    """

    def __init__(
        self, ends_at: float | None, *, longest_s: float = 0.0, speaks: bool = True
    ) -> None:
        self.longest_s = longest_s
        self._speaks = speaks
        self._ends_at = ends_at
        self._asked = False
        self._last = 0.0

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in heard_signals()}
        # What came before, to the process that this one replaced, is delivered now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            if self._speaks:
                os.write(2, f"{STOPPING}\n".encode())  # print is not made for signal handlers

    def between_steps(self, steps_left: int) -> str:
        """Returns the reason to stop, or "". Call it before the first step and after every step,
        with the number of steps that are left."""
        now = time.time()
        self.longest_s = max(self.longest_s, now - self._last if self._last else 0.0)
        self._last = now
        if self._asked:
            return "asked to stop"
        left_s = inf if self._ends_at is None else self._ends_at - now
        if self.longest_s and steps_left and left_s < SLACK * self.longest_s + RESERVE_S:
            return f"the job's time is up in {left_s:.0f} s, too soon for another step"
        return ""

    def step_done(self) -> None:
        """Marks the end of a step: from here to the next `between_steps` the run can be stopped."""
        self.longest_s = max(self.longest_s, time.time() - self._last)

    def within_step(self) -> str:
        """Returns the reason to give up the present step, or "". A run that gives it up is left as
        the step before ended."""
        return "asked to stop" if self._asked and self.longest_s else ""
