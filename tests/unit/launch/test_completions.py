"""vLLM's server on a socket file, with a stand-in for vLLM (the real one is in the integration
tests)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

SERVER = """
import http.server, json, os, pathlib, socketserver, sys
here = pathlib.Path(__file__).parents[3]
(here / "argv").write_text("\\n".join(sys.argv[1:]))
(here / "pid").write_text(str(os.getpid()))
mode = (here / "mode").read_text()
if mode == "broken":
    print("no such architecture", flush=True)
    sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if mode == "never" else 200)
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = json.dumps({"echo": body}).encode() if mode == "sound" else b"too long"
        self.send_response(200 if mode == "sound" else 400)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)
    def address_string(self):
        return "unix"
path = sys.argv[sys.argv.index("--uds") + 1]
(here / "mode_of_folder").write_text(oct(os.stat(os.path.dirname(path)).st_mode & 0o777))
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    pass
Server(path, Handler).serve_forever()
"""

CLIENT = """
import sys
from pathlib import Path
from megatron_qlrl.errors import ReleaseError
from megatron_qlrl.launch.completions import served
try:
    with served(Path("model"), dtype="float32", max_tokens=99, limit_s=float(sys.argv[1]),
                extra=["--seed", "1"]) as complete:
        print(complete({"prompt": [1, 2]})["echo"]["prompt"])
except ReleaseError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("sound", "[1, 2]"),
        ("refuses", "vLLM's server refused a request (400): b'too long'"),
        ("broken", "vLLM's server for model ended with exit code 3 before it was healthy; its last "
                   "lines:\n  no such architecture"),
        ("never", "vLLM's server for model was not healthy after 1 s (--limit); its last lines:"),
    ],
)  # fmt: skip
def test_a_server_of_this_user_alone(tmp_path: Path, mode: str, message: str) -> None:
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(SERVER)
    (tmp_path / "mode").write_text(mode)
    limit = "1" if mode == "never" else "30"
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, limit], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(message), done.stderr
    argv = (tmp_path / "argv").read_text().split("\n")
    socket_file = argv[argv.index("--uds") + 1]
    assert argv == [
        "--model", "model", "--served-model-name", "release", "--uds", socket_file,
        "--dtype", "float32", "--max-model-len", "99", "--generation-config", "vllm",
        "--seed", "1",
    ]  # fmt: skip
    assert not Path(socket_file).parent.exists()
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()
    if mode == "sound":
        assert (tmp_path / "mode_of_folder").read_text() == "0o700"
        assert json.loads(done.stdout) == [1, 2]
