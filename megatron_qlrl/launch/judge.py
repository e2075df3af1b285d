"""A vLLM server for the judge on this machine: start, wait until it is healthy, end it cleanly.

serve -> guard and server, one process group -> /health -> ready -> until it ends or a signal
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from megatron_qlrl.errors import ConfigError, RewardError

POLL_S = 0.2
TAIL_LINES = 20
GRACE_S = 20.0
"""Between SIGTERM to the server and SIGKILL to all its processes."""

_DEFAULTS = {
    # CPU only: key/value cache, and threads that are not pinned to cores others use too.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
# A small model may fill the reply with white space, which JSON allows, up to max_tokens.
_COMPACT_JSON = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})


def serve(model: str, *, host: str, port: int, limit_s: float, extra: Sequence[str]) -> int:
    """Runs `python -m vllm.entrypoints.openai.api_server` until it ends or SIGINT or SIGTERM
    comes; `extra` goes to it unread. A key is taken from VLLM_API_KEY, never from arguments.

    Its output is kept back until it is healthy, and goes to stderr from then on.

    Returns:
        The server's exit code, 128 + n after signal n.

    Raises:
        ConfigError: the port is taken.
        RewardError: the server ended, or was not healthy within `limit_s`; with its last lines.
    """
    _check_port(host, port)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--host", host, "--port", str(port)]
    command += ["--structured-outputs-config", _COMPACT_JSON, *extra]
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    with _signals() as signals, _server(command) as server:
        output = _Output(server)
        deadline = time.monotonic() + limit_s
        while not _healthy(url):
            if signals:
                return 128 + signals[0]
            if server.poll() is not None:
                raise RewardError(
                    f"the judge server ended with exit code {server.wait()} before it was "
                    f"healthy; {output.tail()}"
                )
            if time.monotonic() > deadline:
                raise RewardError(
                    f"the judge server was not healthy after {limit_s:g} s (--limit); "
                    f"{output.tail()}"
                )
            time.sleep(POLL_S)
        print(f"judge ready: {url}/v1 model {model}", flush=True)
        output.show()
        while server.poll() is None and not signals:
            time.sleep(POLL_S)
        return 128 + signals[0] if signals else server.wait()


class _Output:
    """The server's lines: the last few kept, and passed on once `show` was called."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._last: deque[str] = deque(maxlen=TAIL_LINES)
        self._shown = False
        self._thread = threading.Thread(target=self._read, args=(server,), daemon=True)
        self._thread.start()

    def show(self) -> None:
        self._shown = True

    def tail(self) -> str:
        self._thread.join(timeout=1.0)  # a server that has just ended: its last words
        return "its last lines:\n" + "".join(f"  {line}" for line in list(self._last)).rstrip()

    def _read(self, server: subprocess.Popen[str]) -> None:
        assert server.stdout is not None
        for line in server.stdout:
            self._last.append(line)
            if self._shown:
                sys.stderr.write(line)


@contextmanager
def _server(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The server's processes, all of them ended afterwards.

    vLLM's engine is a process of its own and survives a server that is killed. So a guard leads
    the process group: when its standard input closes, because we close it or because we were
    killed ourselves, it kills the whole group.
    """
    guard = subprocess.Popen(
        ["sh", "-c", "read _; kill -9 0"], stdin=subprocess.PIPE, process_group=0
    )
    server = None
    try:
        server = subprocess.Popen(
            command,
            env=_DEFAULTS | dict(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=guard.pid,
        )
        yield server
    finally:
        if server is not None and server.poll() is None:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(GRACE_S)
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()
        if server is not None:
            server.wait()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM."""
    found: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        found.append(number)

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"the judge server cannot listen on {host}:{port} ({error.strerror}); choose "
                "another --port"
            ) from error


def _healthy(url: str) -> bool:
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=2) as reply:
            return reply.status == 200
    except (URLError, OSError):
        return False
