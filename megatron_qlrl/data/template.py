"""Writes one user message per question, and encodes messages with a model's chat template."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from megatron_qlrl.data.control import encode_around, has_control
from megatron_qlrl.errors import ConfigError

Kind = Literal["qa", "math", "choice"]

_QA_CLOSING = (
    "End your response with this sentence, your answer in the brackets: "
    '"Therefore, the answer is (insert answer here)".'
)
_CLOSING: dict[Kind, str] = {
    "qa": _QA_CLOSING,
    "math": _QA_CLOSING,
    "choice": (
        "End your response with this sentence, the letter of the right option in the brackets: "
        '"The correct answer is (insert letter here)".'
    ),
}


def docqa_message(*, document: str, question: str, kind: Kind) -> str:
    """Returns the user message of a question about a document (QwenLong-L1 section 3, Figure 2).

    The closing sentence asks for the sentence that the reward's rules look for. All fields are
    filled in one pass, so a document may hold a placeholder or `</text>`.
    """
    return (
        "Read the text below and answer the question that follows it.\n\n"
        f"<text>\n{document}\n</text>\n\n"
        f"{question}\n\n"
        f"{_CLOSING[kind]}"
    )


def render(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], enable_thinking: bool | None
) -> np.ndarray:
    """Returns the token ids (int32 [P]) of a chat, generation prompt included. Only the template
    makes control tokens; in a message they are plain text (see `data.control`).

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        enable_thinking: passed to the template (Qwen3's reads it) unless it is None.

    Raises:
        ConfigError: the tokenizer has no chat template.
        DataError: the tokenizer cannot write a control token in a message as plain text.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; model.path needs "
            "a tokenizer_config.json or chat_template.jinja that holds one"
        )
    options: dict[str, Any] = {"add_generation_prompt": True}
    if enable_thinking is not None:
        options["enable_thinking"] = enable_thinking
    texts = [text for message in messages for text in message.values()]
    if any(has_control(tokenizer, text) for text in texts):

        def around(hidden: Callable[[str], str]) -> str:
            chat = [{key: hidden(text) for key, text in m.items()} for m in messages]
            return tokenizer.apply_chat_template(chat, tokenize=False, **options)

        return np.asarray(encode_around(tokenizer, around), dtype=np.int32)
    # transformers 4 and 5 return different types without return_dict.
    encoded = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=True, return_dict=True, **options
    )
    return np.asarray(encoded["input_ids"], dtype=np.int32)


def opens_reasoning(tokenizer: Any, token_ids: np.ndarray) -> bool:
    """Returns whether a rendered prompt (int32 [P]) ends in an open `<think>` (R1-Distill's do)."""
    # Tokenizers without a token for the tag need up to eight for it and the line end.
    return tokenizer.decode(token_ids[-8:]).rstrip().endswith("<think>")


def response_decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Returns a function that decodes response ids without special tokens but keeps the tags of the
    reasoning: without `</think>`, which some tokenizers call special, no answer would count."""
    added = tokenizer.added_tokens_decoder
    tags = {i: t.content for i, t in added.items() if t.content in ("<think>", "</think>")}
    tags = {i: tag for i, tag in tags.items() if added[i].special}
    decode = partial(tokenizer.decode, skip_special_tokens=True)

    def decode_around_tags(ids: Sequence[int]) -> str:
        parts: list[str] = []
        start = 0
        for place, token in enumerate(ids):
            if token in tags:
                parts += [decode(ids[start:place]), tags[token]]
                start = place + 1
        return "".join([*parts, decode(ids[start:])])

    return decode_around_tags if tags else decode
