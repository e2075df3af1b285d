"""Asks the LLM judge, on OpenAI-compatible servers, whether a final answer equals the gold.

claim -> cache -> slot -> least busy server -> strict parser -> True, False or no verdict
                            ^        |
                            +- retry +   (pauses with jitter, another server if there is one)
"""

import asyncio
import json
import time
from collections.abc import Mapping

import aiohttp

from megatron_qlrl.config.schema import JudgeConfig
from megatron_qlrl.errors import RewardError
from megatron_qlrl.reward.endpoint import (
    Endpoint,
    EndpointFailure,
    Endpoints,
    open_session,
    retrying,
)
from megatron_qlrl.reward.verdict import Claim, NoVerdict, judge_request, parse_verdict

CACHE_SIZE = 2**17
MAX_REPLY_BYTES = 2**20
"""The limit of a reply: a verdict has a few hundred bytes, a list of models a few thousand."""
LOST_AFTER = 64
"""After this many claims in a row that no server answered, the judge is lost: until a cool-down has
passed, further claims get no verdict at once instead of waiting through all attempts."""
_PROBE = Claim("Which city is the capital of France?", "Paris", "The city of Paris.")


class Judge:
    """Asks for verdicts, in one event loop. A failure leaves its own claim without a verdict, and
    no other one until `LOST_AFTER` of them came in a row.

    Attributes:
        counts: asked (claims), cached (claims that needed no request), yes, failed (claims without
            a verdict), replies (requests that gave a verdict) and latency_s (their total time).
        last_failure: why there was no verdict, the last time.
    """

    def __init__(self, config: JudgeConfig, *, key: str | None, pause_s: float = 0.5) -> None:
        """`pause_s` limits the first pause before another attempt; the limit doubles each time."""
        self.counts = no_counts()
        self.last_failure = ""
        self._config = config
        self._endpoints = Endpoints.of(config, key=key, max_bytes=MAX_REPLY_BYTES)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._retrying = retrying(config.attempts, pause_s=pause_s, max_pause_s=16 * pause_s)
        self._session: aiohttp.ClientSession | None = None
        self._known: dict[bytes, bool] = {}
        self._pending: dict[bytes, asyncio.Task[bool | None]] = {}
        self._failed_in_row = 0
        self._lost_until = 0.0

    async def verdict(self, claim: Claim) -> bool | None:
        """Returns whether the prediction is equivalent to the gold, or None without a verdict."""
        key = claim.key(self._config.model)
        self.counts["asked"] += 1
        self.counts["cached"] += key in self._known or key in self._pending
        verdict = self._known.get(key)
        if verdict is None:
            task = self._pending.get(key)
            if task is None:
                task = self._pending[key] = asyncio.create_task(self._ask(key, claim))
            verdict = await task
        self.counts["failed"] += verdict is None
        self.counts["yes"] += verdict is True
        return verdict

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def check(self) -> list[str]:
        """Returns one line for each server that does not answer, lacks the model, or gives no
        verdict."""
        try:
            problems = [await self._problem(endpoint) for endpoint in self._endpoints]
        finally:
            await self.close()
        return [problem for problem in problems if problem]

    async def _ask(self, key: bytes, claim: Claim) -> bool | None:
        verdict = None
        async with self._slots:
            if time.monotonic() >= self._lost_until:
                verdict = await self._try(claim)
        del self._pending[key]
        if verdict is not None:
            self._known[key] = verdict
            if len(self._known) > CACHE_SIZE:
                del self._known[next(iter(self._known))]
        return verdict

    async def _try(self, claim: Claim) -> bool | None:
        request = judge_request(claim, model=self._config.model, max_tokens=self._config.max_tokens)
        try:
            # `wraps` copies the retrying object, which holds the state of one call.
            verdict = await self._retrying.wraps(self._post)(request)
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
        return verdict

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
    """Returns `Judge.counts` of a judge that was asked nothing."""
    return dict.fromkeys(("asked", "cached", "yes", "failed", "replies", "latency_s"), 0.0)


def check_judge(config: JudgeConfig, *, key: str | None) -> None:
    """Asks every server one question, before expensive work starts.

    Raises:
        RewardError: a server is not ready. The message names each, and why.
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
    """Returns the names in a list of models, or none if the reply is no such list."""
    try:
        return {str(model["id"]) for model in json.loads(body)["data"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()
