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

from megatron_qlrl.errors import ConfigError
from megatron_qlrl.launch.judge import read_key
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[3]
LIMIT_S = 30

SERVER = """
import http.server, os, socket, subprocess, sys, pathlib
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
def argument(name):
    return sys.argv[sys.argv.index(name) + 1]
(here / "key").write_text(os.environ.get("VLLM_API_KEY", "none"))
host = argument("--host")
class Server(http.server.HTTPServer):
    address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
Server((host, int(argument("--port"))), Handler).serve_forever()
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


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("localhost", "localhost")])
def test_other_addresses_of_this_machine(serve: Serve, port: int, host: str, shown: str) -> None:
    process = serve("sound", "--host", host, "--model", "m")
    assert ready(process) == f"judge ready: http://{shown}:{port}/v1 model m\n"


@pytest.mark.parametrize("host", ["2001:db8::1", "no.such.host.invalid", "a..b", "x" * 100])
def test_an_address_that_is_not_of_this_machine(serve: Serve, port: int, host: str) -> None:
    _, err = serve("sound", "--host", host).communicate(timeout=LIMIT_S)
    assert err.count("\n") == 1
    assert f"qlrl: error: the judge server cannot listen on {host}:{port} (" in err


def test_a_key_is_made_once_and_only_its_owner_may_read_it(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "judge.key"
    ready(serve("sound", "--key-file", str(file)))
    key = file.read_text().strip()
    assert len(key) == 43  # 32 random bytes in base64
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "key").read_text() == key
    assert key not in (tmp_path / "argv").read_text()  # where every user of the machine could see
    assert read_key(file) == key


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("key", 0o640, "may be read by others; chmod 600 it"),
        ("", 0o600, "holds no key in one line"),
        ("two\nlines", 0o600, "holds no key in one line"),
    ],
)
def test_a_key_file_that_cannot_be_used(
    tmp_path: Path, content: str, mode: int, message: str
) -> None:
    file = tmp_path / "judge.key"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=message):
        read_key(file)
    with pytest.raises(ConfigError, match="cannot be used"):
        read_key(tmp_path / "none" / "judge.key")
