"""Says what a run is busy with until its first step has ended: loading weights and starting an
engine take minutes, and a silent run looks like a hung one."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TypeVar

from megatron_qlrl.errors import ConfigError
from megatron_qlrl.platform.files import make_folder

T = TypeVar("T")

EVERY_S = 20.0


def say_on_stderr(line: str) -> None:
    """Writes to the real stderr, past `foreign_messages_in`; stdout is for the command's result."""
    print(f"qlrl: {line}", file=sys.__stderr__, flush=True)


class Tally:
    """Counts what is done of a long work, and says how long the rest may take.

    Attributes:
        total: all that is wanted.
        known: what was there before.
        done: what has come since.
    """

    def __init__(self, unit: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`unit` names the things in the plural; the time counts from here."""
        self._unit, self._clock = unit, clock
        self.start()

    def start(self) -> None:
        """Begins anew."""
        self.total = self.known = self.done = 0
        self._started = self._clock()

    def __str__(self) -> str:
        text = f"{self.known + self.done} of {self.total} {self._unit}"
        left = self.total - self.known - self.done
        if not self.done or not left:
            return text
        seconds = (self._clock() - self._started) / self.done * left
        return f"{text}, about {_duration(seconds)} left"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Progress:
    """Says what begins, and every `every_s` seconds what still goes on."""

    def __init__(self, say: Callable[[str], None], *, every_s: float = EVERY_S) -> None:
        self._say, self._every_s = say, every_s
        self._stack: list[tuple[str, float, Tally | None]] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @classmethod
    def of_rank(cls, rank: int) -> "Progress":
        """Returns one that speaks on stderr on rank 0 and is silent on other ranks."""
        return cls(say_on_stderr if rank == 0 else lambda _: None)

    @contextmanager
    def doing(self, what: str, tally: Tally | None = None) -> Iterator[None]:
        """Says that `what` ("loading weights") goes on while the block runs, and how far `tally`
        is; the innermost block speaks."""
        with self._changed:
            self._stack.append((what, time.monotonic(), tally))
            self._say(what)
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._repeat, name="progress", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._stack.pop()
                self._changed.notify()

    def during_first(self, steps: Iterable[T], what: str) -> Iterator[T]:
        """Passes `steps` on, and says that `what` goes on until the caller asks for the second
        one."""
        iterator = iter(steps)
        for first in iterator:
            with self.doing(what):
                yield first
            break
        yield from iterator

    def _repeat(self) -> None:
        with self._changed:
            while self._stack:
                if self._changed.wait(self._every_s) or not self._stack:
                    continue
                what, started, tally = self._stack[-1]
                far = "" if tally is None else f"; {tally}"
                self._say(f"still {what} ({time.monotonic() - started:.0f} s{far})")
            self._thread = None


@contextmanager
def foreign_messages_in(file: Path) -> Iterator[None]:
    """Sends what Python code writes to stderr into `file`: other packages warn a dozen times at
    every start, and nobody can act on it. A stack trace that leaves the context is shown as ever,
    and native code (NCCL, a crash) still writes to the terminal."""
    make_folder(file.parent)
    try:
        # Stays open: loggers made inside keep the stream for the life of the process.
        stream = file.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}; make room there") from error
    with redirect_stderr(stream):
        yield
