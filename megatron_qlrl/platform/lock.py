"""Lets one run at a time use a folder: a file names the holder, and its time shows that it lives.

    run.lock.1    held: its modification time moves every HEARTBEAT_S
    run.lock.2    made by a process that found the holder of .1 gone; it then removes .1

A file is made with O_EXCL, which is atomic on shared disks, too. Nobody writes into or removes the
file of a holder that may live: when several take over at the same time, one gets the next number
and the others see it. flock is not used, because network file systems may keep it to one machine.
"""

import json
import os
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_qlrl.errors import ConfigError
from megatron_qlrl.platform.env import read_job

HEARTBEAT_S = 5.0
SILENCE_S = 60.0
"""A holder on another machine is taken for gone after this long without a sign of life."""
POLL_S = 0.1


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock.

    Attributes:
        machine: boot and process namespace, in which `pid` names the same process.
        started: clock ticks after the boot, because pids are reused; exec keeps pid and start.
        job, restarts: Slurm's job ("" without one) and how often it has been restarted.
        since: when it took the lock, for messages.
    """

    host: str
    machine: str
    pid: int
    started: int
    job: str
    restarts: int
    since: str


class Lock:
    """A lock that is held until `close` or the end of the process. A process that replaces itself
    (exec) keeps it."""

    def __init__(self, base: Path, path: Path, holder: Holder, *, what: str) -> None:
        self._base, self._path, self._holder, self._what = base, path, holder, what
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        with suppress(OSError):
            if _read(self._path) == self._holder:
                self._path.unlink()

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            # A disk that does not answer for a while, or a file removed by hand, proves nothing.
            with suppress(OSError):
                # Look twice: a process that is about to withdraw its file may be there now.
                if self._is_lost() and not self._closed.wait(1.0) and self._is_lost():
                    self._end()
                os.utime(self._path)

    def _is_lost(self) -> bool:
        newest = _files(self._base)[-1:]
        if newest == [self._path]:
            return _read(self._path) != self._holder
        return bool(newest)

    def _end(self) -> None:
        """Ends this process, because two runs in one folder would remove each other's files."""
        print(
            f"qlrl: error: {self._what} was taken over by another run while this one gave no sign "
            f"of life for {SILENCE_S:.0f} s; this one ends",
            file=sys.__stderr__,
            flush=True,
        )
        os._exit(1)


def take_lock(base: Path, *, what: str) -> Lock:
    """Takes the lock `base`, whose files are numbered: at once if its holder is gone, else when
    the holder has been silent for SILENCE_S.

    Args:
        what: what is locked, for messages.

    Raises:
        ConfigError: another process holds it, or its folder cannot be written.
    """
    me = _me()
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        while True:
            others = _files(base)
            for path in others:
                _wait_until_gone(path, me, what=what)
            path = base.with_name(f"{base.name}.{_number(others[-1]) + 1 if others else 1}")
            if not _make(path, me):
                continue
            if _files(base) != [*others, path]:  # someone else was faster
                path.unlink()
                continue
            for other in others:
                other.unlink(missing_ok=True)
            return Lock(base, path, me, what=what)
    except OSError as error:
        raise ConfigError(
            f"{what} cannot be written ({error}); free space there, or name another place"
        ) from error


def _me() -> Holder:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    job, restarts = read_job()
    return Holder(
        host=socket.gethostname(),
        machine=f"{boot} {os.readlink('/proc/self/ns/pid')}",
        pid=os.getpid(),
        started=_start_of(os.getpid()) or 0,
        job=job,
        restarts=restarts,
        since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def _files(base: Path) -> list[Path]:
    """The lock's files, sorted by number."""
    names = (p for p in base.parent.iterdir() if p.name.startswith(f"{base.name}."))
    return sorted((p for p in names if p.suffix[1:].isdigit()), key=_number)


def _number(path: Path) -> int:
    return int(path.suffix[1:])


def _make(path: Path, holder: Holder) -> bool:
    """Makes the file; False if it is there already."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(handle, "w") as stream:
            stream.write(json.dumps(asdict(holder)))
    except OSError:
        path.unlink(missing_ok=True)  # the disk is full
        raise
    return True


def _read(path: Path) -> Holder | None:
    """Returns the holder, or None if the file is not written yet or unreadable."""
    try:
        holder = Holder(**json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = (holder.pid, holder.started, holder.restarts)
    return holder if all(type(n) is int for n in numbers) else None


def _wait_until_gone(path: Path, me: Holder, *, what: str) -> None:
    """Returns when the holder of the file is gone.

    Raises:
        ConfigError: it lives.
    """
    with suppress(FileNotFoundError):  # it has just let go
        if _read(path) is None:
            time.sleep(1.0)  # whoever makes it writes right after; it may be a moment old
        holder, seen = _read(path), path.stat().st_mtime_ns
        is_near = holder is not None and holder.machine == me.machine
        # A process that was killed may take a moment to end.
        patience_s = 2 * HEARTBEAT_S if is_near else SILENCE_S - _age_s(path)
        deadline = time.monotonic() + patience_s
        if not is_near and patience_s > 0 and not _is_gone(holder, me):
            print(f"qlrl: {what} may be in use by {_named(holder)}; waiting for a sign of life, "
                  f"{patience_s:.0f} s at most", flush=True)  # fmt: skip
        while not _is_gone(holder, me):
            silent = time.monotonic() > deadline
            if path.stat().st_mtime_ns != seen or (silent and is_near):
                raise ConfigError(
                    f"{what} is in use by another run, {_named(_read(path))}. Wait until it ends "
                    "or stop it, or name another place; when a process has died, its hold ends by "
                    f"itself within {SILENCE_S:.0f} s"
                )
            if silent:
                return
            time.sleep(POLL_S)


def _named(holder: Holder | None) -> str:
    if holder is None:
        return "an unknown process"
    return f"process {holder.pid} on {holder.host} (since {holder.since})"


def _is_gone(holder: Holder | None, me: Holder) -> bool:
    """Returns whether the holder has certainly ended, or is this process itself."""
    if holder is None:
        return False
    if holder.machine == me.machine:
        is_me = (holder.pid, holder.started) == (me.pid, me.started)
        return is_me or not _runs(holder.pid, holder.started)
    return holder.job == me.job != "" and holder.restarts < me.restarts


def _runs(pid: int, started: int) -> bool:
    try:
        return _start_of(pid) == started
    except OSError:  # there is none, or it is another user's and the system hides it
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True


def _start_of(pid: int) -> int | None:
    """Returns when a process of this machine started, in clock ticks after the boot, or None if
    only its exit code is left."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _age_s(path: Path) -> float:
    """Returns the time since the last change, by the disk's clock: machines' clocks differ."""
    with tempfile.TemporaryFile(dir=path.parent) as probe:
        return os.fstat(probe.fileno()).st_mtime - path.stat().st_mtime
