"""Keeps control tokens in a text, such as "<|im_end|>" in a document about chat models, plain text.

A tokenizer turns these characters into the token that ends a message wherever they stand, so a
document could end the user's message. Here only the chat template makes control tokens. Texts
without any are tokenized as usual.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from secrets import token_hex
from typing import Any

from tokenizers import Tokenizer

from megatron_qlrl.errors import DataError

# Prompts may name these tags, and responses are made with them, so they are no control tokens, even
# where a model marks them as special. Some models (R1-Distill) do not mark their role tokens.
_TAGS = ("<think>", "</think>")
_PIPE_FORM = re.compile(r"<[|｜].{1,60}?[|｜]>")


def has_control(tokenizer: Any, text: str) -> bool:
    """Returns whether the tokenizer would read a part of `text` as a control token."""
    return _marks(tokenizer).search(text) is not None


def escaped(tokenizer: Any, text: str) -> str:
    """Returns `text` for another server, which tokenizes it: with a space after the first character
    of each control token, of this tokenizer or in the usual form <|name|>."""

    def part(match: re.Match[str]) -> str:
        return f"{match[0][0]} {match[0][1:]}"

    return _PIPE_FORM.sub(part, _marks(tokenizer).sub(part, text))


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a text, with its control tokens as plain text.

    Raises:
        DataError: the tokenizer cannot write one of them as plain text.
    """
    if not has_control(tokenizer, text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return _renamed(tokenizer).encode(text)


def encode_around(tokenizer: Any, render: Callable[[Callable[[str], str]], str]) -> list[int]:
    """Returns the token ids of a chat template's text; control tokens are the template's alone.

    Args:
        render: gets a function and applies it to each message's text; returns what the template
            makes of the results.

    Raises:
        DataError: as `encode_plain`.
    """
    renamed = _renamed(tokenizer)
    text = renamed.live(render(renamed.hidden))
    return renamed.encode(renamed.shown(text))


class _Renamed:
    """The tokenizer with its control tokens renamed, so that their old names are plain text.

    The new names are random, so that no text can hold one.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"a text holds a control token of the tokenizer of {tokenizer.name_or_path!r}, "
                "which has no tokenizer.json; convert it to one, or take the text out"
            )
        self._marks = _marks(tokenizer)
        added: dict[str, int] = {
            token.content: i for i, token in tokenizer.added_tokens_decoder.items()
        }
        names = [t.content for t in tokenizer.added_tokens_decoder.values() if _is_control(t)]
        key = token_hex(8)
        self._live = {name: f"<{key}-live-{number}>" for number, name in enumerate(names)}
        self._hidden = {name: f"<{key}-text-{number}>" for number, name in enumerate(names)}
        tree = json.loads(backend.to_str())
        for token in tree["added_tokens"]:
            token["content"] = self._live.get(token["content"], token["content"])
        tree["post_processor"] = None  # it names the old tokens, and would add none here
        self._tokenizer = Tokenizer.from_str(json.dumps(tree))
        # Added tokens get new ids if they did not follow all the other tokens.
        number_of = self._tokenizer.token_to_id
        self._ids = {number_of(self._live.get(name) or name): i for name, i in added.items()}
        self._unwritable = {number_of(name): name for name in names}  # words of the model itself

    def live(self, text: str) -> str:
        return self._marks.sub(lambda match: self._live[match[0]], text)

    def hidden(self, text: str) -> str:
        return self._marks.sub(lambda match: self._hidden[match[0]], text)

    def shown(self, text: str) -> str:
        for name, hidden in self._hidden.items():
            text = text.replace(hidden, name)
        return text

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        for token in self._unwritable.keys() & set(ids):
            raise DataError(
                f"a text holds {self._unwritable[token]!r}, which this tokenizer can only write as "
                "the control token of that name; take it out of the text"
            )
        return [self._ids.get(i, i) for i in ids]


def _is_control(token: Any) -> bool:
    if token.content in _TAGS:
        return False
    return token.special or _PIPE_FORM.fullmatch(token.content) is not None


@lru_cache(maxsize=2)
def _marks(tokenizer: Any) -> re.Pattern[str]:
    """Returns the pattern of the tokenizer's control tokens; it matches the longest."""
    tokens = tokenizer.added_tokens_decoder.values()
    names = sorted((t.content for t in tokens if _is_control(t)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


_renamed = lru_cache(maxsize=2)(_Renamed)
