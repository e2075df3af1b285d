"""A vLLM server as a subprocess of this one: its start, its last lines, and its end."""

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

POLL_S = 0.2
TAIL_LINES = 20
GRACE_S = 20.0
"""The time between SIGTERM to the server and SIGKILL to all its processes."""

_DEFAULTS = {
    # On a CPU: GiB of key/value cache, and threads that are not pinned to cores others use too.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class Server:
    """A running server. Its lines are read all the time: the last few are kept, and all are passed
    on to stderr once `show` was called."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._last: deque[str] = deque(maxlen=TAIL_LINES)
        self._shown = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait_healthy(
        self, healthy: Callable[[], bool], *, limit_s: float, stopped: Callable[[], bool]
    ) -> str:
        """Waits until the server is healthy or `stopped` holds. Returns "", or why it will never
        be healthy, with its last lines."""
        deadline = time.monotonic() + limit_s
        while not stopped() and not healthy():
            if self.process.poll() is not None:
                code = self.process.wait()
                return f"ended with exit code {code} before it was healthy; {self._tail()}"
            if time.monotonic() > deadline:
                return f"was not healthy after {limit_s:g} s (--limit); {self._tail()}"
            time.sleep(POLL_S)
        return ""

    def show(self) -> None:
        self._shown = True

    def _tail(self) -> str:
        self._thread.join(timeout=1.0)  # lets the last lines of a server that just ended arrive
        return "its last lines:\n" + "".join(f"  {line}" for line in list(self._last)).rstrip()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._last.append(line)
            if self._shown:
                sys.stderr.write(line)


@contextmanager
def vllm_server(arguments: Sequence[str], env: Mapping[str, str]) -> Iterator[Server]:
    """Starts `python -m vllm.entrypoints.openai.api_server`; afterwards all its processes have
    ended.

    vLLM's engine is a process of its own and survives a server that is killed. So a guard leads
    the process group and kills all of it when its standard input closes: because this process
    closes it, or because this process was killed.

    Args:
        env: added to this process's environment.
    """
    guard = subprocess.Popen(
        ["sh", "-c", "read _; kill -9 0"], stdin=subprocess.PIPE, process_group=0
    )
    process = None
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            env=_DEFAULTS | dict(os.environ) | dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=guard.pid,
        )
        yield Server(process)
    finally:
        if process is not None and process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()
        if process is not None:
            process.wait()
