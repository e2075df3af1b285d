"""A real headless Chromium and one page in it, driven over the DevTools protocol.

Debian's package chromium; installed when it is missing and this is root.
"""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

WAIT_S = 120


class Page:
    """A page that is open in the browser.

    Attributes:
        problems: what the console had as errors and warnings, exceptions, and requests made.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._calls = 0
        self._loaded = False
        self.problems: list[str] = []

    async def open(self, path: Path) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._call(f"{domain}.enable")
        await self._call("Page.navigate", url=path.as_uri())
        async with asyncio.timeout(WAIT_S):
            while not self._loaded:
                self._note(await self._socket.receive_json())

    async def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression, which must be plain data."""
        reply = await self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    async def press(self, key: str) -> None:
        """Presses a key where the focus is, as a person would."""
        codes = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39}
        text = {"text": "\r"} if key == "Enter" else {}
        settings = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], **text}
        await self._call("Input.dispatchKeyEvent", type="keyDown", **settings)
        await self._call("Input.dispatchKeyEvent", type="keyUp", **settings)

    async def prefer(self, scheme: str) -> None:
        """Makes the page light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await self._call("Emulation.setEmulatedMedia", features=[feature])

    async def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": parameters})
        async with asyncio.timeout(WAIT_S):
            while True:
                message = await self._socket.receive_json()
                if message.get("id") == self._calls:
                    assert "error" not in message, message
                    return message["result"]
                self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not self._loaded and parameters.get("type") == "Document":
                return  # the page itself
            self.problems.append(f"request: {url}")
        elif method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.problems.append(f"{method}: {json.dumps(parameters)}")
        elif method == "Page.javascriptDialogOpening":
            self.problems.append("a dialog was opened")


@asynccontextmanager
async def open_page(path: Path, *, profile: Path) -> AsyncIterator[Page]:
    """Opens a file in a browser of its own, which keeps its files in `profile`."""
    program = _install()
    arguments = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--window-size=1280,900", "--remote-debugging-port=0",
        f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    quiet = asyncio.subprocess.DEVNULL
    browser = await asyncio.create_subprocess_exec(program, *arguments, stdout=quiet, stderr=quiet)
    try:
        async with asyncio.timeout(WAIT_S):
            while not (profile / "DevToolsActivePort").exists():
                await asyncio.sleep(0.1)
            while len(lines := (profile / "DevToolsActivePort").read_text().split()) < 2:
                await asyncio.sleep(0.1)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{lines[0]}") as session:
            async with session.put("/json/new?about:blank") as reply:
                target = await reply.json()
            url = target["webSocketDebuggerUrl"]
            async with session.ws_connect(url, max_msg_size=0) as socket:
                page = Page(socket)
                await page.open(path)
                yield page
    finally:
        browser.kill()
        await browser.wait()


def _install() -> str:
    if program := shutil.which("chromium"):
        return program
    why = "the tests of reports need a real browser, and chromium is not installed"
    assert os.geteuid() == 0, f"{why}; as root: apt-get install chromium"
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-qq", "-y", "--no-install-recommends", "chromium"],
    ):
        env = dict(os.environ) | {"DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(
            command, env=env, capture_output=True, check=False, text=True, timeout=400
        )
        assert done.returncode == 0, f"{why}; {' '.join(command)} failed:\n{done.stderr}"
    program = shutil.which("chromium")
    assert program, why
    return program
