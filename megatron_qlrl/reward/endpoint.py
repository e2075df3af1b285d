"""One judge server over HTTP, and the choice among several.

aiohttp and not the openai client: on one core of the machine it was measured on, with 64
requests in flight, openai gave 430 verdicts/s at 2.2 ms of CPU each, httpx less, and aiohttp
1,160 at 0.17 ms; those milliseconds are taken from the rollout engine's Python thread.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp

from megatron_qlrl.reward.verdict import NoVerdict

# The request itself was refused; another server or another try would refuse it too.
_REQUEST_FAULTS = (400, 413, 422)
_MAX_SHOWN_CHARS = 200


class EndpointFailure(Exception):
    """This server did not answer as a server in order does; another, or later, it may."""


class Endpoint:
    """One server. `in_flight` and `resting_until` belong to `Endpoints`."""

    def __init__(self, url: str, *, key: str | None, timeout_s: float, max_bytes: int) -> None:
        """`timeout_s` and `max_bytes` bound a whole reply, however it comes."""
        self.url = url
        self.in_flight = 0
        self.resting_until = 0.0
        self._key = key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes

    async def chat(self, session: aiohttp.ClientSession, request: dict[str, Any]) -> bytes:
        """Body of the reply to a chat completion."""
        return await self._send(session, "POST", "/chat/completions", request)

    async def models(self, session: aiohttp.ClientSession) -> bytes:
        """Body of the list of models."""
        return await self._send(session, "GET", "/models", None)

    def shown(self, text: str) -> str:
        """Foreign text for a message: one line, bounded, without the key that servers echo."""
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:_MAX_SHOWN_CHARS]

    async def _send(
        self, session: aiohttp.ClientSession, method: str, path: str, request: Any
    ) -> bytes:
        """
        Raises:
            NoVerdict: the server refused this request.
            EndpointFailure: no reply in time, one that is too long, or one that says nothing of
                the request.
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
                reply.close()  # else the rest would be read to use the connection again
                raise EndpointFailure(f"{self.url}: a reply of more than {self._max_bytes} bytes")
        return bytes(body)


def open_session(connections: int) -> aiohttp.ClientSession:
    """For the requests of one event loop. Replies are not unpacked: a few bytes of gzip can hold
    gigabytes, and nothing packed is asked for."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections),
        headers={"Accept-Encoding": "identity"},
        auto_decompress=False,
    )


class Endpoints:
    """Least requests in flight first; a server that failed rests for `cooldown_s`."""

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

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._all)

    @contextmanager
    def use(self) -> Iterator[Endpoint]:
        """The server for one request; when all rest, the one that rests longest already."""
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
