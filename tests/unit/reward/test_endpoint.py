"""Servers that never stop: what is read of a reply is bounded in bytes and in time."""

import asyncio
import gzip
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from megatron_qlrl.config.schema import TeacherConfig
from megatron_qlrl.distill.teacher import Teacher
from megatron_qlrl.reward import judge as judge_module
from megatron_qlrl.reward.endpoint import Endpoint, EndpointFailure, open_session

LIMIT = 100_000
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def ask(handler: Handler, use: Callable[[str], Awaitable[Any]]) -> Any:
    """What `use` gives for the URL of a server whose every reply comes from `handler`."""

    async def work() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            return await use(f"http://127.0.0.1:{port}/v1")
        finally:
            await runner.cleanup()

    return asyncio.run(work())


def chat(timeout_s: float) -> Callable[[str], Awaitable[bytes]]:
    async def use(url: str) -> bytes:
        endpoint = Endpoint(url, key=None, timeout_s=timeout_s, max_bytes=LIMIT)
        async with open_session(1) as session:
            return await endpoint.chat(session, {})

    return use


class Endless:
    """A reply without an end; `sent` counts its bytes."""

    def __init__(self, *, chunk: bytes, pause_s: float = 0.0, status: int = 200) -> None:
        self.sent = 0
        self._chunk, self._pause_s, self._status = chunk, pause_s, status

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(status=self._status)
        await reply.prepare(request)
        while self.sent < 2**30:
            await reply.write(self._chunk)
            self.sent += len(self._chunk)
            await asyncio.sleep(self._pause_s)
        return reply


@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_reply_without_an_end_is_left_at_the_limit(status: int) -> None:
    server = Endless(chunk=b"x" * 10_000, status=status)
    with pytest.raises(EndpointFailure, match="a reply of more than 100000 bytes"):
        ask(server, chat(timeout_s=30))
    assert LIMIT < server.sent < 50 * LIMIT  # the rest is what the sockets hold


def test_a_reply_that_drips_is_left_at_the_time_limit() -> None:
    server = Endless(chunk=b"x", pause_s=0.02)
    start = time.monotonic()
    with pytest.raises(EndpointFailure, match=r"no reply within 0\.3 s"):
        ask(server, chat(timeout_s=0.3))
    assert time.monotonic() - start < 5
    assert 0 < server.sent < 100


def test_a_packed_reply_is_not_unpacked() -> None:
    packed = gzip.compress(b"x" * 50 * LIMIT)
    asked: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers["Accept-Encoding"])
        return web.Response(body=packed, headers={"Content-Encoding": "gzip"})

    assert ask(handler, chat(timeout_s=30)) == packed
    assert asked == ["identity"]


def test_a_reply_up_to_the_limit_is_whole() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"x" * LIMIT)

    assert ask(handler, chat(timeout_s=30)) == b"x" * LIMIT


def test_judge_and_teacher_have_a_limit() -> None:
    """The teacher's is the largest one: a server without an end gets no more from either."""
    server = Endless(chunk=b"x" * 2**20)

    async def use(url: str) -> str:
        config = TeacherConfig.model_validate(
            {"urls": [url], "model": "m", "attempts": 1, "timeout_s": 60}
        )
        teacher = Teacher(config, key=None)
        async with open_session(1) as session:
            assert await teacher.answer(session, {}) is None
        return teacher.last_failure

    assert "a reply of more than 16777216 bytes" in ask(server, use)
    assert server.sent < 2**26
    assert judge_module.MAX_REPLY_BYTES == 2**20


def test_headers_without_an_end_are_refused() -> None:
    sent = 0

    async def work() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n")
            try:
                while sent < 2**28:
                    lines = b"".join(b"X-%d: y\r\n" % (sent + n) for n in range(1000))
                    writer.write(lines)
                    sent += len(lines)
                    await writer.drain()
            except ConnectionError:
                pass
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            await chat(timeout_s=20)(f"http://127.0.0.1:{port}/v1")

    with pytest.raises(EndpointFailure):
        asyncio.run(work())
    assert sent < 2**26
