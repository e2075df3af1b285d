"""An OpenAI-compatible service that answers prompts, and how its answers fit the student."""

import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from megatron_qlrl.config.schema import TeacherConfig
from megatron_qlrl.reward.endpoint import EndpointFailure, Endpoints, retrying
from megatron_qlrl.reward.verdict import NoVerdict

MAX_REPLY_BYTES = 2**24
"""Enough for 100,000 tokens with every character as a JSON escape."""


class Teacher:
    """An OpenAI-compatible service that answers prompts; lives in one event loop."""

    def __init__(self, config: TeacherConfig, *, key: str | None) -> None:
        self.last_failure = ""
        self._config = config
        self._endpoints = Endpoints.of(config, key=key, max_bytes=MAX_REPLY_BYTES)
        self._retrying = retrying(config.attempts, pause_s=1, max_pause_s=30)

    async def answer(
        self, session: aiohttp.ClientSession, request: Mapping[str, Any]
    ) -> tuple[str, bool] | None:
        """Returns the response after the generation prompt and whether it ended by itself, or None
        where no server gave one."""
        try:
            body = await self._retrying.wraps(self._post)(session, request)
            return read_answer(body)
        except (NoVerdict, EndpointFailure) as error:
            self.last_failure = str(error)
            return None

    async def _post(self, session: aiohttp.ClientSession, request: Mapping[str, Any]) -> bytes:
        with self._endpoints.use() as endpoint:
            return await endpoint.chat(session, {"model": self._config.model, **request})


def read_answer(body: bytes) -> tuple[str, bool]:
    """Returns the response of a chat completion and whether it is whole. Where the server separates
    reasoning (`reasoning` or `reasoning_content`) from content, the closing tag joins them.

    Raises:
        NoVerdict: the body is no chat completion.
    """
    try:
        choice = json.loads(body)["choices"][0]
        message = choice["message"]
        content = message["content"] or ""
        reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
        finished = choice["finish_reason"] == "stop"
        f"{content}{reasoning}".encode()  # JSON can hold halves of characters
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise NoVerdict(f"not a chat completion: {type(error).__name__}") from error
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise NoVerdict("not a chat completion: its text is none")
    if reasoning:
        return f"{reasoning.strip()}\n</think>\n\n{content.lstrip()}", finished
    return content, finished


def fit_reasoning(response: str, *, reasoning_open: bool) -> str:
    """Returns a teacher's response as it follows the student's generation prompt: without `<think>`
    where the prompt opens it, with `<think>` where the response closes what nobody opened."""
    if reasoning_open:
        return response.lstrip().removeprefix("<think>").lstrip("\n")
    closes = "</think>" in response and "<think>" not in response
    return f"<think>\n{response}" if closes else response
