"""A judge server by hand: HTTP/1.1, chat completions, and every way to misbehave."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "fake-judge"


@dataclass
class Reply:
    """What goes back. `content` becomes a chat completion unless there is a `body`;
    `wait_s` passes first."""

    content: str = '{"equivalent": true}'
    status: int = 200
    finish_reason: str = "stop"
    body: bytes | None = None
    wait_s: float = 0.0

    def encoded(self) -> bytes:
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "content": self.content}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


def verdict(value: bool) -> Reply:
    return Reply(json.dumps({"equivalent": value}))


def same_initial(fields: dict[str, str]) -> Reply:
    """A judge of simple tastes: equal first letters are equivalent."""
    return verdict(fields["candidate"][:1].lower() == fields["reference"][:1].lower())


@dataclass
class FakeJudge:
    """`answer` maps {question, reference, candidate} to the reply; `asked` keeps them in the
    order of arrival and `requests` the whole requests, `headers` their headers."""

    answer: Callable[[dict[str, str]], Reply] = same_initial
    key: str | None = None
    asked: list[dict[str, str]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def candidates(self) -> list[str]:
        return [fields["candidate"] for fields in self.asked]


@contextmanager
def running(judge: FakeJudge, *, port: int = 0) -> Iterator[FakeJudge]:
    """Serves `judge` on a port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self._allowed():
                self._send(200, json.dumps({"data": [{"id": MODEL}]}).encode())

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._allowed():
                return
            text = request["messages"][-1]["content"]
            fields = json.loads(text) if text.startswith("{") else {"prompt": text}
            with judge.lock:
                judge.requests.append(request)
                judge.asked.append(fields)
                judge.in_flight += 1
                judge.most_in_flight = max(judge.most_in_flight, judge.in_flight)
            reply = judge.answer(fields)
            time.sleep(reply.wait_s)
            with judge.lock:
                judge.in_flight -= 1
            self._send(reply.status, reply.encoded())

        def _allowed(self) -> bool:
            given = self.headers.get("Authorization", "")
            if judge.key is None or given == f"Bearer {judge.key}":
                return True
            # Real servers have been seen to repeat what they were sent.
            self._send(401, f'{{"error": "wrong key: {given}"}}'.encode())
            return False

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that gave up

    server = Server(("127.0.0.1", port), Handler)
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
