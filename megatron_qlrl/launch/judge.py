"""Runs a vLLM server for the judge on this machine: starts it, waits until it is healthy, ends it.

serve -> guard and server in one process group -> /health -> ready -> the server's end or a signal
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from megatron_qlrl.errors import ConfigError, RewardError
from megatron_qlrl.launch.local import received

POLL_S = 0.2
STOPS = (signal.SIGINT, signal.SIGTERM)
TAIL_LINES = 20
GRACE_S = 20.0
"""The time between SIGTERM to the server and SIGKILL to all its processes."""

_DEFAULTS = {
    # On a CPU: GiB of key/value cache, and threads that are not pinned to cores others use too.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
# A small model may fill the reply with white space, which JSON allows, up to max_tokens.
_COMPACT_JSON = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})


def serve(
    model: str,
    *,
    host: str,
    port: int,
    limit_s: float,
    key_file: Path | None,
    extra: Sequence[str],
) -> int:
    """Runs `python -m vllm.entrypoints.openai.api_server` until it ends or SIGINT or SIGTERM
    arrives. The server's output is held back until it is healthy and then goes to stderr.

    Args:
        key_file: holds the server's key (see `read_key`); without it VLLM_API_KEY does. A key is
            never passed as an argument, which other users could read.
        extra: arguments that are passed on to the server as they are.

    Returns:
        The server's exit code, or 128 + n after signal n.

    Raises:
        ConfigError: the port is taken, or the key file cannot be used.
        RewardError: the server ended, or was not healthy within `limit_s`. The message holds its
            last lines.
    """
    _check_port(host, port)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--host", host, "--port", str(port)]
    command += ["--structured-outputs-config", _COMPACT_JSON, *extra]
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{local}]' if ':' in local else local}:{port}"
    key = {} if key_file is None else {"VLLM_API_KEY": read_key(key_file)}
    with received(STOPS) as signals, _server(command, key) as server:
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
    """Reads the server's lines: keeps the last few, and passes all on once `show` was called."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._last: deque[str] = deque(maxlen=TAIL_LINES)
        self._shown = False
        self._thread = threading.Thread(target=self._read, args=(server,), daemon=True)
        self._thread.start()

    def show(self) -> None:
        self._shown = True

    def tail(self) -> str:
        self._thread.join(timeout=1.0)  # lets the last lines of a server that just ended arrive
        return "its last lines:\n" + "".join(f"  {line}" for line in list(self._last)).rstrip()

    def _read(self, server: subprocess.Popen[str]) -> None:
        assert server.stdout is not None
        for line in server.stdout:
            self._last.append(line)
            if self._shown:
                sys.stderr.write(line)


@contextmanager
def _server(command: list[str], key: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Starts the server; afterwards all its processes have ended.

    vLLM's engine is a process of its own and survives a server that is killed. So a guard leads
    the process group and kills all of it when its standard input closes: because this process
    closes it, or because this process was killed.
    """
    guard = subprocess.Popen(
        ["sh", "-c", "read _; kill -9 0"], stdin=subprocess.PIPE, process_group=0
    )
    server = None
    try:
        server = subprocess.Popen(
            command,
            env=_DEFAULTS | dict(os.environ) | dict(key),
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


def read_key(file: Path) -> str:
    """Returns the key in `file`, which only its owner may read. A missing file is written with a
    new key.

    Raises:
        ConfigError: others may read the file, it holds no key, or it cannot be read or written.
    """
    try:
        with suppress(FileExistsError):
            number = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(number, "w") as new:
                new.write(secrets.token_urlsafe(32) + "\n")
        key = file.read_text(encoding="utf-8").strip()
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        raise ConfigError(f"--key-file {file} cannot be used: {error}") from error
    if mode & 0o077:
        raise ConfigError(f"--key-file {file} may be read by others; chmod 600 it, or remove it")
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(f"--key-file {file} holds no key in one line; remove it to get a new one")
    return key


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: no valid host name
        raise ConfigError(
            f"the judge server cannot listen on {host}:{port} "
            f"({getattr(error, 'strerror', None) or error}); choose another --port or --host"
        ) from error


def _healthy(url: str) -> bool:
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=2) as reply:
            return reply.status == 200
    except (URLError, OSError):
        return False
