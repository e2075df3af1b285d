"""Shortens prompts for evaluation as QwenLong-L1's release does: the text of the messages loses its
middle, then the chat template is applied. So the question at the end survives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_qlrl.data.template import render
from megatron_qlrl.errors import DataError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Limits:
    """How long a prompt may be.

    Attributes:
        text_tokens: of the user's text, before the chat template.
        prompt_tokens: of the whole prompt, chat template included; None for no limit.
    """

    text_tokens: int
    prompt_tokens: int | None = None


def cut_and_render(
    tokenizer: Any, messages: Messages, enable_thinking: bool | None, limits: Limits
) -> tuple[Messages, np.ndarray]:
    """Returns the messages after `cut_messages`, and their token ids (see `render`).

    A prompt that is too long with its chat template is cut again, from the whole text and in the
    same place, until it fits. An error instead would refuse every benchmark with long documents to
    a model of few positions.

    Raises:
        DataError: what is never cut is too long.
    """
    room = limits.prompt_tokens
    max_tokens = limits.text_tokens if room is None else min(limits.text_tokens, room)
    while max_tokens > 0:
        kept = cut_messages(tokenizer, messages, max_tokens)
        token_ids = render(tokenizer, kept, enable_thinking)
        if room is None or len(token_ids) <= room:
            return kept, token_ids
        max_tokens -= len(token_ids) - room
    raise DataError(
        f"the chat template and the system message alone have more than the {room} tokens that the "
        "model's positions leave beside a response; shorten the system message, or lower "
        "rollout.max_response_tokens"
    )


def cut_messages(tokenizer: Any, messages: Messages, max_tokens: int) -> Messages:
    """Returns the messages without the middle of their text, or as they are if it is short enough.

    A single user message keeps the first and the last half of `max_tokens` tokens, its special
    tokens counted; other messages stay whole. Of a conversation the last user message stays whole
    and the text before it, taken as one, loses its middle; messages that lose all of their text go.
    A last message that is too long by itself is left alone and cut as a single one.
    """
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        return messages
    last = users[-1]
    if len(users) == 1:
        message = messages[last]
        text = _cut_text(tokenizer, message["content"], max_tokens)
        return [*messages[:last], message | {"content": text}, *messages[last + 1 :]]
    older, asked = messages[:last], messages[last:]
    room = max_tokens - sum(len(tokenizer(m["content"])["input_ids"]) for m in asked)
    if room < 0:
        return cut_messages(tokenizer, asked, max_tokens)
    return [*_cut_conversation(tokenizer, older, room), *asked]


def middle_truncate(token_ids: Sequence[int], max_tokens: int) -> Sequence[int]:
    """Returns the first and the last `max_tokens` / 2 tokens of a longer sequence. The tail, which
    holds the question, gets the odd token."""
    assert max_tokens > 0, max_tokens
    if len(token_ids) <= max_tokens:
        return token_ids
    head = max_tokens // 2
    return [*token_ids[:head], *token_ids[len(token_ids) - (max_tokens - head) :]]


def _cut_text(tokenizer: Any, text: str, max_tokens: int) -> str:
    token_ids = tokenizer(text)["input_ids"]
    if len(token_ids) <= max_tokens:
        return text
    kept = middle_truncate(token_ids, max_tokens)
    return tokenizer.decode(kept, skip_special_tokens=True)


def _cut_conversation(tokenizer: Any, messages: Messages, max_tokens: int) -> Messages:
    """Returns the first half of `max_tokens` tokens and the last half. Two messages of one role
    that meet at the gap become one, because some chat templates want the roles to alternate."""
    encoded = [tokenizer(m["content"], add_special_tokens=False)["input_ids"] for m in messages]
    total = sum(map(len, encoded))
    if total <= max_tokens:
        return messages
    gap_start = max_tokens // 2
    gap_end = total - (max_tokens - gap_start)

    def kept(message: dict[str, str], token_ids: Sequence[int], part: Sequence[int]) -> Messages:
        if not part:
            return []
        whole = len(part) == len(token_ids)
        text = message["content"] if whole else tokenizer.decode(part, skip_special_tokens=True)
        return [message | {"content": text}]

    heads: Messages = []
    tails: Messages = []
    start = 0
    for message, ids in zip(messages, encoded, strict=True):
        heads += kept(message, ids, ids[: max(gap_start - start, 0)])
        tails += kept(message, ids, ids[max(gap_end - start, 0) :])
        start += len(ids)
    if heads and tails and heads[-1]["role"] == tails[0]["role"]:
        joined = heads.pop()
        tails[0] = joined | {"content": joined["content"] + tails[0]["content"]}
    return [*heads, *tails]
