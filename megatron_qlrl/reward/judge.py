"""The LLM judge: OpenAI-compatible servers that say whether a final answer equals the gold.

claim -> cache -> slot -> least busy server -> strict parser -> True, False or no verdict
                            ^        |
                            +- retry +   (pauses with jitter, another server if there is one)
"""

import asyncio
import json
import time
from collections.abc import Mapping

import aiohttp
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from megatron_qlrl.config.schema import JudgeConfig
from megatron_qlrl.errors import RewardError
from megatron_qlrl.reward.endpoint import Endpoint, EndpointFailure, Endpoints, open_session
from megatron_qlrl.reward.verdict import Claim, NoVerdict, judge_request, parse_verdict

CACHE_SIZE = 2**17
MAX_REPLY_BYTES = 2**20
"""A verdict has a few hundred bytes, a server's list of models a few thousand."""
LOST_AFTER = 64
"""So many claims in a row without an answering server: the judge is lost, and no claim waits
through all its tries and time limits any more until a cool-down has passed."""
_PROBE = Claim("Which city is the capital of France?", "Paris", "The city of Paris.")


class Judge:
    """Asks for verdicts; lives in one event loop. A failure costs its own claim the verdict and
    nothing else.

    `counts`: asked (verdicts wanted), cached (of them without a request of their own), yes,
    failed, replies (that held a verdict) and latency_s (their total time).
    """

    def __init__(self, config: JudgeConfig, *, key: str | None, pause_s: float = 0.5) -> None:
        """`pause_s`: the first pause before another try is at most so long, each further one
        twice that."""
        self.counts = no_counts()
        self.last_failure = ""
        self._config = config
        self._endpoints = Endpoints(
            [
                Endpoint(url, key=key, timeout_s=config.timeout_s, max_bytes=MAX_REPLY_BYTES)
                for url in config.urls
            ],
            cooldown_s=config.cooldown_s,
        )
        self._slots = asyncio.Semaphore(config.concurrency)
        self._retrying = AsyncRetrying(
            stop=stop_after_attempt(config.attempts),
            wait=wait_random_exponential(multiplier=pause_s, max=16 * pause_s),
            retry=retry_if_exception_type(EndpointFailure),
            reraise=True,
        )
        self._session: aiohttp.ClientSession | None = None
        self._known: dict[bytes, bool] = {}
        self._pending: dict[bytes, asyncio.Task[bool | None]] = {}
        self._failed_in_row = 0
        self._lost_until = 0.0

    async def verdict(self, claim: Claim) -> bool | None:
        """Whether the prediction is equivalent to the gold; None: no verdict to be had."""
        key = claim.key(self._config.model)
        self.counts["asked"] += 1
        self.counts["cached"] += key in self._known or key in self._pending
        found = self._known.get(key)
        if found is None:
            task = self._pending.get(key)
            if task is None:
                task = self._pending[key] = asyncio.create_task(self._ask(key, claim))
            found = await task
        self.counts["failed"] += found is None
        self.counts["yes"] += found is True
        return found

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def check(self) -> list[str]:
        """What is wrong with the servers, one line each: does it answer, does it have the
        model, does it give a verdict?"""
        try:
            found = [await self._problem(endpoint) for endpoint in self._endpoints]
        finally:
            await self.close()
        return [problem for problem in found if problem]

    async def _ask(self, key: bytes, claim: Claim) -> bool | None:
        found = None
        async with self._slots:
            if time.monotonic() >= self._lost_until:
                found = await self._try(claim)
        del self._pending[key]
        if found is not None:
            self._known[key] = found
            if len(self._known) > CACHE_SIZE:
                del self._known[next(iter(self._known))]
        return found

    async def _try(self, claim: Claim) -> bool | None:
        request = judge_request(claim, model=self._config.model, max_tokens=self._config.max_tokens)
        try:
            # `wraps` copies: a retrying object holds the state of one call.
            found = await self._retrying.wraps(self._post)(request)
        except NoVerdict as error:
            self.last_failure = str(error)
            return None
        except EndpointFailure as error:
            self.last_failure = str(error)
            self._failed_in_row += 1
            if self._failed_in_row >= LOST_AFTER:
                self._lost_until = time.monotonic() + self._config.cooldown_s
            return None
        self._failed_in_row = 0
        return found

    async def _post(self, request: Mapping[str, object]) -> bool:
        with self._endpoints.use() as endpoint:
            start = time.perf_counter()
            verdict = await self._verdict_of(endpoint, request)
            self.counts["replies"] += 1
            self.counts["latency_s"] += time.perf_counter() - start
            return verdict

    async def _verdict_of(self, endpoint: Endpoint, request: Mapping[str, object]) -> bool:
        body = await endpoint.chat(self._open(), dict(request))
        try:
            return parse_verdict(body)
        except NoVerdict as error:
            raise NoVerdict(f"{endpoint.url}: {endpoint.shown(str(error))}") from None

    async def _problem(self, endpoint: Endpoint) -> str:
        model = self._config.model
        try:
            names = _model_names(await endpoint.models(self._open()))
            if names and model not in names:
                others = endpoint.shown(", ".join(sorted(names)[:5]))
                return (
                    f"{endpoint.url}: there is no model '{model}', only {others}; set "
                    "reward.judge.model"
                )
            request = judge_request(_PROBE, model=model, max_tokens=self._config.max_tokens)
            await self._verdict_of(endpoint, request)
        except (NoVerdict, EndpointFailure) as error:
            return str(error)
        return ""

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = open_session(self._config.concurrency)
        return self._session


def no_counts() -> dict[str, float]:
    return dict.fromkeys(("asked", "cached", "yes", "failed", "replies", "latency_s"), 0.0)


def check_judge(config: JudgeConfig, *, key: str | None) -> None:
    """Asks every server one question, before expensive work.

    Raises:
        RewardError: naming each server that is not ready, and why.
    """

    async def probe() -> list[str]:
        return await Judge(config, key=key).check()

    problems = asyncio.run(probe())
    if problems:
        raise RewardError(
            f"the judge is not ready: {'; '.join(problems)}. Start a server with `qlrl judge "
            "serve`, mend reward.judge, or leave reward.judge out to use the rules alone"
        )


def _model_names(body: bytes) -> set[str]:
    """Names in a list of models; empty when the server gives no such list."""
    try:
        return {str(model["id"]) for model in json.loads(body)["data"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()
