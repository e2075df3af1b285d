"""Runs a vLLM server for the judge on this machine: starts it, waits until it is healthy, ends it.

serve -> guard and server in one process group -> /health -> ready -> the server's end or a signal
"""

import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from megatron_qlrl.errors import ConfigError, RewardError
from megatron_qlrl.launch.local import received
from megatron_qlrl.launch.server import POLL_S, vllm_server

STOPS = (signal.SIGINT, signal.SIGTERM)
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
    arguments = ["--model", model, "--host", host, "--port", str(port)]
    arguments += ["--structured-outputs-config", _COMPACT_JSON, *extra]
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{local}]' if ':' in local else local}:{port}"
    key = {} if key_file is None else {"VLLM_API_KEY": read_key(key_file)}
    with received(STOPS) as signals, vllm_server(arguments, key) as server:
        problem = server.wait_healthy(
            lambda: _healthy(url), limit_s=limit_s, stopped=lambda: bool(signals)
        )
        if problem:
            raise RewardError(f"the judge server {problem}")
        if not signals:
            print(f"judge ready: {url}/v1 model {model}", flush=True)
            server.show()
        while server.process.poll() is None and not signals:
            time.sleep(POLL_S)
        return 128 + signals[0] if signals else server.process.wait()


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
