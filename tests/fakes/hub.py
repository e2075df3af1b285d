"""What an upload meets of the hub: a repository is made, looked at, and gets one commit."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class FakeHub:
    """Takes every file within the commit; none goes to large file storage.

    Attributes:
        files: what the repository holds, by name.
        tokens: the authorization header of each request.
        visibility: "private" or "public" once it was made.
    """

    def __init__(self, *, refuses: bool = False) -> None:
        self.files: dict[str, bytes] = {}
        self.tokens: list[str | None] = []
        self.requests: list[str] = []
        self.visibility: str | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(hub.get(self.path))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.tokens.append(self.headers.get("Authorization"))
                hub.requests.append(f"POST {self.path}")
                self._reply(None if refuses else hub.post(self.path, body))

            def _reply(self, value: Any) -> None:
                content = json.dumps(value if value is not None else {"error": "refused"}).encode()
                self.send_response(200 if value is not None else 403)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def get(self, path: str) -> Any:
        if "/tree/" in path:
            return [{"type": "file", "path": n, "size": len(c), "oid": "0"}
                    for n, c in self.files.items()]  # fmt: skip
        siblings = [{"rfilename": name} for name in self.files]
        return {"id": "me/model", "private": self.visibility == "private", "siblings": siblings,
                "sha": "0" * 40}  # fmt: skip

    def post(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            said = json.loads(body)
            private = said.get("private") or said.get("visibility") == "private"
            self.visibility = self.visibility or ("private" if private else "public")
            return {"url": f"{self.url}/me/model"}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False}
                              for name in names]}  # fmt: skip
        if "/commit/" in path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    file = item["value"]
                    self.files[file["path"]] = base64.b64decode(file["content"])
            return {
                "success": True,
                "commitOid": "1" * 40,
                "commitUrl": f"{self.url}/me/model/commit/1",
            }
        return {}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
