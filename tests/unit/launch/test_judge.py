"""`qlrl judge serve` as a process, with a stand-in for vLLM's server (the real one is in the
integration tests)."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_qlrl.platform.env import free_port

ROOT = Path(__file__).resolve().parents[3]
LIMIT_S = 30

SERVER = """
import http.server, os, subprocess, sys, pathlib
here = pathlib.Path(__file__).parents[3]
helper = subprocess.Popen(["sleep", "300"])  # as vLLM's engine, a process of its own
(here / "pids").write_text(f"{os.getpid()} {helper.pid}")
(here / "argv").write_text("\\n".join(sys.argv[1:]))
print("loading weights", flush=True)
mode = (here / "mode").read_text()
if mode == "broken":
    print("no such model: x", flush=True)
    sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/end":
            os._exit(5)
        self.send_response(200 if mode == "sound" else 503)
        self.end_headers()
        print("asked for", self.path, flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

Serve = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def serve(tmp_path: Path, port: int) -> Iterator[Serve]:
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(SERVER)
    started: list[subprocess.Popen[str]] = []

    def start(mode: str, *more: str) -> subprocess.Popen[str]:
        (tmp_path / "mode").write_text(mode)
        env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
        command = [sys.executable, "-m", "megatron_qlrl", "judge", "serve", "--port", str(port)]
        pipe = subprocess.PIPE
        process = subprocess.Popen([*command, *more], env=env, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def gone(tmp_path: Path) -> bool:
    """Whether the server and its helper end within the limit."""
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ready_then_ended_by_a_signal_with_all_its_processes(
    serve: Serve, port: int, tmp_path: Path
) -> None:
    process = serve("sound", "--model", "some/model", "--", "--dtype", "float32")
    assert ready(process) == f"judge ready: http://127.0.0.1:{port}/v1 model some/model\n"
    argv = (tmp_path / "argv").read_text().split("\n")
    assert argv[:6] == ["--model", "some/model", "--host", "127.0.0.1", "--port", str(port)]
    assert argv[-2:] == ["--dtype", "float32"]
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert "loading weights" not in err  # kept back until it was healthy
    assert gone(tmp_path)


def test_a_killed_launcher_leaves_nothing_behind(serve: Serve, tmp_path: Path) -> None:
    process = serve("sound")
    assert "Qwen/Qwen2.5-1.5B-Instruct" in ready(process)
    process.kill()
    assert gone(tmp_path)


def test_a_server_that_ends_hands_on_its_code(serve: Serve, port: int, tmp_path: Path) -> None:
    process = serve("sound")
    ready(process)
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /end HTTP/1.0\r\n\r\n")
        client.recv(1)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 5
    assert gone(tmp_path)


def test_a_server_that_does_not_start_shows_its_last_lines(serve: Serve, tmp_path: Path) -> None:
    process = serve("broken")
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (2, "")
    assert err.splitlines() == [
        "qlrl: error: the judge server ended with exit code 3 before it was healthy; its last "
        "lines:",
        "  loading weights",
        "  no such model: x",
    ]
    assert gone(tmp_path)


def test_a_server_that_is_never_healthy_is_given_up(serve: Serve, tmp_path: Path) -> None:
    process = serve("sick", "--limit", "3")
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert "was not healthy after 3 s (--limit); its last lines:\n  " in err
    assert "  asked for /health\n" in err
    assert gone(tmp_path)


def test_a_port_that_is_taken(serve: Serve, port: int, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        process = serve("sound")
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use); choose another" in err
    assert not (tmp_path / "pids").exists()
