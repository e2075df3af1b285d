"""Ends a process whose step does not end: a lost peer, a stuck kernel, a dead file system.

Every rank watches itself. Ranks that wait for a lost one give up at about the same time, each
leaves the stacks of its threads, and the job's launcher sees processes that failed.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

FACTOR = 10
"""A step this many times longer than the longest before it is far over its usual time."""
GRACE_S = 10.0
"""The wait after writing stacks: a launcher ends all ranks once the first has exited."""


def watch_steps(steps: Iterable[T], *, stacks: Path, floor_s: float) -> Iterator[T]:
    """Passes `steps` on. A step, with the caller's work on it, may take `floor_s` or FACTOR times
    the longest step so far, whichever is more. After that the stacks of all threads are written to
    the file `stacks` and the process ends with exit code 1."""
    iterator, longest = iter(steps), 0.0
    while True:
        started = time.monotonic()
        with _deadline(max(floor_s, FACTOR * longest), stacks):
            try:
                step = next(iterator)
            except StopIteration:
                return
            yield step
        longest = max(longest, time.monotonic() - started)


@contextmanager
def _deadline(limit_s: float, stacks: Path) -> Iterator[None]:
    timer = threading.Timer(limit_s, _give_up, (limit_s, stacks))
    timer.daemon = True
    timer.start()
    # This needs no interpreter: it also ends code that hangs with the GIL, without the message.
    faulthandler.dump_traceback_later(limit_s + GRACE_S, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _give_up(limit_s: float, stacks: Path) -> None:
    print(
        f"qlrl: error: no step has ended for {limit_s:.0f} s, far over the usual time: the run is "
        f"taken for hung. Where every rank is: {stacks.parent}/*.txt (a rank without a file did "
        "not answer). Start again: the run resumes. If steps may take that long, raise "
        "run.hang_after_s",
        file=sys.__stderr__,  # past what sends other packages' messages to a file
        flush=True,
    )
    stacks.parent.mkdir(parents=True, exist_ok=True)
    with stacks.open("w") as out:
        faulthandler.dump_traceback(out, all_threads=True)
    time.sleep(GRACE_S)
    os._exit(1)
