"""Why a run should end now: someone said so by a signal, or the job's time will be up."""

import os
import signal
import time
from math import inf
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""SIGUSR1: the batch script, before its time is up. SIGTERM: a scheduler that takes the machine.
SIGINT, Ctrl-C, is one of them too where a run can be saved."""
STOPPING = "qlrl: stopping after this step; Ctrl-C again ends at once"
SLACK, RESERVE_S = 1.5, 60.0
"""Another step is begun if the job's time suffices for SLACK times the longest step so far, and
RESERVE_S for the rest of a checkpoint. The first of a job is begun whatever time is left, and ended
once it is begun: a job that came back only to give up again would do so for ever."""


def interrupt_ends() -> None:
    """From now on Ctrl-C ends this process as other programs: at once, even in the middle of C
    code, without a stack trace. Where a shell has started it to ignore Ctrl-C, it still does."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def heard_signals() -> tuple[signal.Signals, ...]:
    """All that ask to stop, without Ctrl-C where a shell has started this process to ignore it."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    return STOP_SIGNALS if ignored else (*STOP_SIGNALS, signal.SIGINT)


class StopSignals:
    """Inside it (a context manager) the signals end nothing; they are noted, for this rank. But a
    second Ctrl-C ends the process.

    Args:
        ends_at: when the job's time is up, in seconds since the epoch; None: nobody knows. Steps at
            long context take longer than the warning that jobs get by default.
        longest_s: what the longest step took that the job has done before; 0: it has done none.
        speaks: this rank answers Ctrl-C with a line on stderr.
    """

    def __init__(
        self, ends_at: float | None, *, longest_s: float = 0.0, speaks: bool = True
    ) -> None:
        self.longest_s = longest_s
        self._speaks = speaks
        self._ends_at = ends_at
        self._found = False
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
        self._found = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            if self._speaks:
                os.write(2, f"{STOPPING}\n".encode())  # print is not made for signal handlers

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
