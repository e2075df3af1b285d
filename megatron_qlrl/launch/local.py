"""Runs several ranks on this machine: starts and watches them, passes signals on, and shows the
error of the rank that failed first.

    launch -> one child per rank -> first failure (or signal) -> end the others -> exit code

This is not torchrun, because torchrun takes seconds to import torch and adds a stack trace and a
table of its own; here a failing rank's message is shown once and alone.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_qlrl.errors import STOPPED
from megatron_qlrl.platform.env import LISTENER, listen
from megatron_qlrl.platform.stop import STOPPING, heard_signals

ERROR_DIR = "QLRL_ERROR_DIR"
"""The variable that names the folder for users' errors; only children of `launch` have it."""

POLL_S = 0.05
SETTLE_S = 0.5
"""How long to wait after the first user's error: every rank may be about to report the same."""
GRACE_S = 15.0
"""How long a rank that reported a user's error may take to leave by itself."""
TAIL_LINES = 30


@dataclass(frozen=True)
class Child:
    """One running rank. Rank 0 writes to our own output, the others to `log`."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def code(self) -> int | None:
        """The exit code as a shell gives it (128 + n for signal n), or None while it runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code


def launch(
    argv: list[str], *, processes: int, saves: bool = False, module: str = "megatron_qlrl"
) -> int:
    """Runs `python -m megatron_qlrl <argv>` as `processes` ranks on this machine.

    Rank 0's output is shown as it comes. When a rank fails, the others are ended and its message
    is shown: the user's error that it reported, or else the end of its output. Signals that ask a
    run to stop are passed on to every rank, Ctrl-C as SIGTERM; a second signal ends them at once.

    Args:
        saves: whether the command saves when it is asked to stop. That takes a while, so Ctrl-C
            is then answered with a line that says so.

    Returns:
        0, the exit code of the first failing rank, 128 + n after signal n, or STOPPED if all ranks
        ended with it.
    """
    children: list[Child] = []
    with (
        received(heard_signals()) as signals,
        tempfile.TemporaryDirectory(prefix="qlrl_") as name,
        listen("127.0.0.1") as listener,
    ):
        folder = Path(name)
        try:
            for env in _environments(processes, folder, listener):
                children.append(_start([sys.executable, "-m", module, *argv], env, folder))
            listener.close()  # it is rank 0's now
            return _watch(children, signals, folder, saves=saves)
        finally:
            _kill(children)


@contextmanager
def received(numbers: Iterable[signal.Signals]) -> Iterator[list[int]]:
    """Yields a list to which these signals are appended as they arrive, instead of their usual
    effect."""
    signals: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        signals.append(number)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report_error(message: str, rank: int) -> bool:
    """Leaves a rank's error for `launch` to show. Returns whether `launch` started this process."""
    folder = os.environ.get(ERROR_DIR)
    if folder is None:
        return False
    # The file is renamed into place, so that half a message is never read.
    part = Path(folder) / f"{rank}.part"
    part.write_text(message, encoding="utf-8")
    part.rename(Path(folder) / f"{rank}.error")
    return True


def is_child() -> bool:
    """Returns whether `launch` started this process."""
    return ERROR_DIR in os.environ


def num_gpus(environ: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> int:
    """Counts the GPUs that this process may use, without loading torch."""
    environ = os.environ if environ is None else environ
    present = sum(1 for d in devices.glob("nvidia*") if d.name.removeprefix("nvidia").isdigit())
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    names = [name.strip() for name in visible.split(",")]
    # CUDA reads the list up to the first entry that is no device.
    usable = next((i for i, n in enumerate(names) if not n or n.startswith("-")), len(names))
    return min(present, usable)


def format_errors(messages: Mapping[int, str]) -> list[str]:
    """Returns each of the ranks' messages once, with the rank's number unless rank 0 has it too.

    >>> format_errors({0: "no such file", 1: "no such file", 2: "disk is full"})
    ['no such file', 'rank 2: disk is full']
    """
    shown: dict[str, str] = {}
    for rank in sorted(messages):
        text = messages[rank]
        named = rank == 0 or text.startswith("rank ")
        shown.setdefault(text, text if named else f"rank {rank}: {text}")
    return list(shown.values())


def _environments(processes: int, folder: Path, listener: socket.socket) -> list[dict[str, str]]:
    """Returns one environment per rank, in rank order."""
    common = dict(os.environ)
    common.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    common.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(listener.getsockname()[1]))
    common[ERROR_DIR] = str(folder)
    common.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    environments = [common | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
    environments[0][LISTENER] = str(listener.fileno())
    return environments


def _start(command: list[str], env: dict[str, str], folder: Path) -> Child:
    rank = int(env["RANK"])
    log = folder / f"{rank}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output if rank else None,
            stderr=output if rank else None,
            # Ctrl-C of the terminal must reach the ranks once, through us.
            start_new_session=True,
            pass_fds=[int(env[LISTENER])] if LISTENER in env else [],
            # Safe: this process has no other threads.
            preexec_fn=_die_with_parent,  # noqa: PLW1509
        )
    return Child(rank, process, log)


def _die_with_parent() -> None:
    """Lets Linux end the rank when the launcher is killed: no orphan keeps the run folder busy."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _watch(children: list[Child], signals: list[int], folder: Path, *, saves: bool) -> int:
    while not signals:
        failed = [c for c in children if c.code not in (None, 0, STOPPED)]
        if failed or _messages(folder):
            return _fail(children, failed, folder)
        if all(c.code is not None for c in children):
            return max(c.code or 0 for c in children)
        time.sleep(POLL_S)
    if saves and signals[0] == signal.SIGINT:
        print(STOPPING, file=sys.stderr, flush=True)
    return _stop(children, signals, folder)


def _stop(children: list[Child], signals: list[int], folder: Path) -> int:
    """Passes the first signal on and lets the ranks finish; another signal ends them at once."""
    number = signals[0]
    handed_on = signal.SIGTERM if number == signal.SIGINT else number
    for child in children:
        child.process.send_signal(handed_on)
    while len(signals) == 1:
        failed = [c for c in children if c.code not in (None, 0, STOPPED, 128 + handed_on)]
        if failed or _messages(folder):
            return _fail(children, failed, folder)
        codes = [c.code for c in children]
        # A rank that did not handle signals yet has ended; the others would wait for it.
        if None not in codes or 128 + handed_on in codes:
            break
        time.sleep(POLL_S)
    stopped = all(c.code == STOPPED for c in children)
    return STOPPED if stopped else 128 + number


def _fail(children: list[Child], failed: list[Child], folder: Path) -> int:
    time.sleep(SETTLE_S)
    for child in children:
        if child.rank not in _messages(folder):
            child.process.kill()  # it waits for the failed rank and would not listen to signals
    # A rank that reported an error leaves by itself (it may be closing its logs).
    deadline = time.monotonic() + GRACE_S
    while any(c.code is None for c in children) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    messages = _messages(folder)
    first = failed[0] if failed else children[min(messages)]
    code = first.code or 2  # of its error, not of the kill that a rank slow to leave gets
    _kill(children)
    for line in format_errors(messages):
        print(f"qlrl: error: {line}", file=sys.stderr, flush=True)
    if not messages:
        _show_end(first)
    return code


def _kill(children: list[Child]) -> None:
    for child in children:
        if child.code is None:
            child.process.kill()
            child.process.wait()


def _messages(folder: Path) -> dict[int, str]:
    return {int(f.stem): f.read_text(encoding="utf-8") for f in folder.glob("*.error")}


def _show_end(child: Child) -> None:
    """Names the rank that failed and shows its last lines, which rank 0 has shown already."""
    print(f"qlrl: rank {child.rank} failed with exit code {child.code}", file=sys.stderr)
    if child.rank:
        lines = child.log.read_text(encoding="utf-8", errors="replace").splitlines()
        sys.stderr.writelines(f"  {line}\n" for line in lines[-TAIL_LINES:])
    sys.stderr.flush()
