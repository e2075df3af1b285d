"""Talks to judge servers over HTTP, and chooses among several.

It uses aiohttp instead of the openai client, because the CPU time is taken from the rollout
engine's Python thread: measured on one core with 64 requests in flight, openai gave 430 verdicts/s
at 2.2 ms of CPU each, httpx fewer, and aiohttp 1,160 at 0.17 ms.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from megatron_qlrl.config.schema import JudgeConfig, TeacherConfig
from megatron_qlrl.reward.verdict import NoVerdict

# The request itself was refused, and another server or another attempt would refuse it, too.
_REQUEST_FAULTS = (400, 413, 422)
_MAX_SHOWN_CHARS = 200


class EndpointFailure(Exception):
    """A server did not answer as it should; another server or a later attempt may succeed."""


class Endpoint:
    """One server. `in_flight` and `resting_until` belong to `Endpoints`."""

    def __init__(self, url: str, *, key: str | None, timeout_s: float, max_bytes: int) -> None:
        """`timeout_s` and `max_bytes` limit a whole reply."""
        self.url = url
        self.in_flight = 0
        self.resting_until = 0.0
        self._key = key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes

    async def chat(self, session: aiohttp.ClientSession, request: dict[str, Any]) -> bytes:
        """Returns the body of the reply to a chat completion; raises as `_send`."""
        return await self._send(session, "POST", "/chat/completions", request)

    async def models(self, session: aiohttp.ClientSession) -> bytes:
        """Returns the body of the list of models; raises as `_send`."""
        return await self._send(session, "GET", "/models", None)

    def shown(self, text: str) -> str:
        """Returns foreign text for a message: one short line, without an echoed key."""
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:_MAX_SHOWN_CHARS]

    async def _send(
        self, session: aiohttp.ClientSession, method: str, path: str, request: Any
    ) -> bytes:
        """Returns the body of the reply.

        Raises:
            NoVerdict: the server refused this request.
            EndpointFailure: the reply is late, too long, or another error.
        """
        try:
            async with session.request(
                method,
                self.url + path,
                json=request,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
                allow_redirects=False,  # the key is for this host alone
            ) as reply:
                body = await self._read(reply)
        except TimeoutError:
            raise EndpointFailure(f"{self.url}: no reply within {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise EndpointFailure(f"{self.url}: {self.shown(str(error) or repr(error))}") from None
        if reply.status == 200:
            return body
        fault = f"{self.url}: HTTP {reply.status} {self.shown(body.decode('utf-8', 'replace'))}"
        raise NoVerdict(fault) if reply.status in _REQUEST_FAULTS else EndpointFailure(fault)

    async def _read(self, reply: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in reply.content.iter_any():
            body += chunk
            if len(body) > self._max_bytes:
                reply.close()  # else aiohttp reads the rest to reuse the connection
                raise EndpointFailure(f"{self.url}: a reply of more than {self._max_bytes} bytes")
        return bytes(body)


def open_session(connections: int) -> aiohttp.ClientSession:
    """Returns a session for one event loop. It asks for uncompressed replies and decompresses none,
    because a few bytes of gzip can hold gigabytes."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections),
        headers={"Accept-Encoding": "identity"},
        auto_decompress=False,
    )


def retrying(attempts: int, *, pause_s: float, max_pause_s: float) -> AsyncRetrying:
    """Returns what repeats a call after an `EndpointFailure`, at most `attempts` times in all, with
    random pauses whose limit begins at `pause_s` and doubles each time."""
    return AsyncRetrying(
        stop=stop_after_attempt(attempts),
        wait=wait_random_exponential(multiplier=pause_s, max=max_pause_s),
        retry=retry_if_exception_type(EndpointFailure),
        reraise=True,
    )


class Endpoints:
    """Chooses the server with the fewest requests in flight; one that failed rests `cooldown_s`."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        cooldown_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._all = tuple(endpoints)
        self._cooldown_s = cooldown_s
        self._clock = clock

    @classmethod
    def of(
        cls, config: JudgeConfig | TeacherConfig, *, key: str | None, max_bytes: int
    ) -> "Endpoints":
        """Returns the servers of a config."""
        each = (
            Endpoint(url, key=key, timeout_s=config.timeout_s, max_bytes=max_bytes)
            for url in config.urls
        )
        return cls(tuple(each), cooldown_s=config.cooldown_s)

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._all)

    @contextmanager
    def use(self) -> Generator[Endpoint, None, None]:
        """Yields the server for one request. If all rest, it is the one whose rest ends first."""
        now = self._clock()
        awake = [e for e in self._all if e.resting_until <= now]
        chosen = (
            min(awake, key=lambda e: e.in_flight)
            if awake
            else min(self._all, key=lambda e: e.resting_until)
        )
        chosen.in_flight += 1
        try:
            yield chosen
        except EndpointFailure:
            chosen.resting_until = self._clock() + self._cooldown_s
            raise
        finally:
            chosen.in_flight -= 1
