"""vLLM's server for one model folder, on a socket that only this user can reach."""

import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_qlrl.errors import ReleaseError
from megatron_qlrl.launch.server import vllm_server

NAME = "release"
"""Name under which the model is served."""
REPLY_S = 600.0


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=REPLY_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@contextmanager
def served(
    folder: Path, *, dtype: str, max_tokens: int, limit_s: float, extra: Sequence[str]
) -> Iterator[Callable[[Mapping[str, Any]], Mapping[str, Any]]]:
    """Yields a function that posts a body to /v1/completions of a server for the model in `folder`
    and returns the reply. The server listens at a file in a folder of this user's alone: no other
    process can take its place, and no port is needed.

    Args:
        max_tokens: of a prompt with its answer.
        limit_s: until it must be healthy.
        extra: further arguments for vLLM.

    Raises:
        ReleaseError: the server does not start, or refuses a request.
    """
    with TemporaryDirectory(prefix="qlrl-") as name:
        path = Path(name) / "vllm.sock"
        arguments = ["--model", str(folder), "--served-model-name", NAME, "--uds", str(path)]
        arguments += ["--dtype", dtype, "--max-model-len", str(max_tokens)]
        # Else the folder's generation_config.json changes how the server samples.
        arguments += ["--generation-config", "vllm", *extra]
        with vllm_server(arguments, {}) as server:
            problem = server.wait_healthy(
                lambda: _healthy(path), limit_s=limit_s, stopped=lambda: False
            )
            if problem:
                raise ReleaseError(f"vLLM's server for {folder} {problem}")
            yield lambda body: _post(path, body)


def _healthy(path: Path) -> bool:
    try:
        return _request(path, "GET", "/health")[0] == 200
    except (OSError, HTTPException):
        return False


def _post(path: Path, body: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        status, reply = _request(path, "POST", "/v1/completions", json.dumps(body))
        if status == 200:
            return json.loads(reply)
    except (OSError, HTTPException, ValueError) as error:
        raise ReleaseError(f"vLLM's server gave no answer: {error}; start it again") from error
    raise ReleaseError(f"vLLM's server refused a request ({status}): {reply[:300]!r}")


def _request(path: Path, method: str, url: str, body: str | None = None) -> tuple[int, bytes]:
    connection = _UnixConnection(path)
    try:
        connection.request(method, url, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()
