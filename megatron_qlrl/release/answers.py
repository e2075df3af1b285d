"""What vLLM's server says of a model folder, against transformers in this process.

fixed prompts -> server: log-probs of the prompt, a greedy answer with its log-probs
              -> transformers, in a wider type (exact) and in the folder's own (the peer)

The server may be as far from the exact log-probs as the peer is, up to `MAX_RATIO` and `RMS_RATIO`:
both round in the folder's type, in another order. Where it chose another token than the exact
model would, the exact log-probs of the two must be a tie within that bound.
Held by tests/unit/release/test_answers.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_qlrl.errors import ReleaseError

MAX_RATIO, RMS_RATIO, UNITS = 3.0, 2.0, 8
"""Largest and root-mean-square error over the peer's, and what is added to both, in units in the
last place (float32) of the largest and the root-mean-square value: a peer may be exact."""
ANSWER_TOKENS, LONG_TOKENS = 32, 1500
_WIDER = {"float32": torch.float64, "bfloat16": torch.float32, "float16": torch.float32}
_QUESTIONS = (
    "What is 17 + 25? Answer with a number.",
    "Name three rivers of Europe, and say in one sentence which of them is the longest.",
    "Repeat this line: def f(x): return x ** 2  # Grüße, 北京, naïve — 3.14159",
)

Complete = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Sends the body of a request to /v1/completions and returns the reply's."""


@dataclass(frozen=True)
class Answer:
    """A prompt and the greedy answer of the server.

    Attributes:
        prompt, tokens: token ids [P], [R].
        logprobs: of the prompt's tokens from the second on, then of the answer's: [P - 1 + R].
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Scored:
    """What transformers says of the same tokens, in the order of `Answer.logprobs`.

    Attributes:
        logprobs: of each token.
        best: of the likeliest token in its place.
    """

    logprobs: np.ndarray
    best: np.ndarray


def fixed_prompts(tokenizer: Any, max_positions: int) -> list[list[int]]:
    """Returns the token ids of three short prompts and of one that is as long as `LONG_TOKENS` and
    the model's positions allow."""
    limit = min(LONG_TOKENS, max_positions - ANSWER_TOKENS)
    prompts = [_chat(tokenizer, question) for question in _QUESTIONS]
    facts, longest = "", None
    for number in range(1, 200):
        facts += f"Box {number} holds {number * 7919 % 1000} stones.\n"
        tokens = _chat(tokenizer, f"{facts}How many stones does box {number // 2 + 1} hold?")
        if len(tokens) > limit:
            break
        longest = tokens
    kept = [p for p in [*prompts, *([longest] if longest else [])] if 1 < len(p) <= limit]
    if not kept:
        raise ReleaseError(f"no test prompt fits into {max_positions} positions")
    return kept


def _chat(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def ask(complete: Complete, model: str, prompts: Sequence[list[int]]) -> Iterator[Answer]:
    """Yields the server's answers to the prompts.

    Raises:
        ReleaseError: a reply is not what vLLM's server sends.
    """
    for prompt in prompts:
        body = {
            "model": model, "prompt": prompt, "temperature": 0, "max_tokens": ANSWER_TOKENS,
            "logprobs": 1, "prompt_logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        reply = complete(body)
        try:
            choice = reply["choices"][0]
            places = zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
            read = [float(place[str(token)]["logprob"]) for token, place in places]
            tokens = [int(token) for token in choice["token_ids"]]
            said = [float(value) for value in choice["logprobs"]["token_logprobs"]]
            assert len(said) == len(tokens)
        except (KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
            raise ReleaseError(
                f"vLLM's server sent no log-probs ({type(error).__name__}: {error}): "
                f"{str(reply)[:200]}; it must be of the version in requirements/"
            ) from error
        yield Answer(prompt, tokens, read + said)


@torch.inference_mode()
def score(folder: Path, dtype: torch.dtype, answers: Sequence[Answer]) -> Scored:
    """Returns what transformers says of prompts and answers, computed in `dtype` on the CPU.

    Raises:
        ReleaseError: transformers cannot load the folder.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            experts_implementation="eager",  # the grouped product takes no float64
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ReleaseError(f"transformers cannot load {folder}: {error}") from error
    own, best = [], []
    for answer in answers:
        tokens = torch.tensor([answer.prompt + answer.tokens])
        logits = model(tokens).logits[0, :-1]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        logprobs = logits.to(wide).log_softmax(-1)
        own.append(logprobs.gather(1, tokens[0, 1:, None])[:, 0].double().numpy())
        best.append(logprobs.max(-1).values.double().numpy())
    return Scored(np.concatenate(own), np.concatenate(best))


def torch_dtype(dtype: str) -> torch.dtype:
    return getattr(torch, dtype)


def wider(dtype: str) -> torch.dtype:
    """Returns the type in which log-probs count as exact for weights of this type."""
    return _WIDER[dtype]


def compare_logprobs(answers: Sequence[Answer], exact: Scored, peer: Scored) -> str:
    """
    Raises:
        ReleaseError: the server's log-probs are further from the exact ones than the bound.
    """
    ours = np.array([value for answer in answers for value in answer.logprobs])
    error = np.abs(ours - exact.logprobs)
    most, typical = _bounds(exact, peer)
    figures = (
        f"largest difference {error.max():.2g} (at most {most:.2g}), root mean square "
        f"{_rms(error):.2g} (at most {typical:.2g})"
    )
    # Written so that NaN is refused too.
    if not (error.max() <= most and _rms(error) <= typical):
        raise ReleaseError(
            f"vLLM and transformers disagree about this folder: {figures}, in nats over "
            f"{len(ours):,} tokens; compare config.json (rope_parameters, dtype) with the base "
            "model's, and the versions of vLLM and transformers with those in requirements/"
        )
    return f"{figures}, in nats over {len(ours):,} tokens"


def compare_choices(answers: Sequence[Answer], exact: Scored, peer: Scored) -> str:
    """
    Raises:
        ReleaseError: the server chose a token that is not the likeliest, and no tie.
    """
    tie = 2 * _bounds(exact, peer)[0]  # either side of it may be wrong by the bound
    total, ties, at, first = 0, 0, 0, ""
    for number, answer in enumerate(answers, start=1):
        at += len(answer.prompt) - 1
        gaps = (exact.best - exact.logprobs)[at : at + len(answer.tokens)]
        at, total = at + len(answer.tokens), total + len(answer.tokens)
        for place in np.flatnonzero(gaps > 0):
            where = (
                f"prompt {number}, token {place + 1} of the answer: vLLM's choice is "
                f"{gaps[place]:.2g} nats less likely than transformers'"
            )
            if not gaps[place] <= tie:
                raise ReleaseError(
                    f"greedy answers differ at {where}, and {tie:.2g} would be a tie; the two do "
                    "not compute the same model: see the line on log-probs"
                )
            ties, first = ties + 1, first or where
    lines = f"{total} tokens of {len(answers)} answers are transformers' own choice"
    return f"{lines}, but for {ties} tie(s); first: {first}" if ties else lines


def _bounds(exact: Scored, peer: Scored) -> tuple[float, float]:
    error = peer.logprobs - exact.logprobs
    highest = float(np.abs(exact.logprobs).max())
    return (
        MAX_RATIO * float(np.abs(error).max()) + UNITS * float(np.spacing(np.float32(highest))),
        RMS_RATIO * _rms(error) + UNITS * float(np.spacing(np.float32(_rms(exact.logprobs)))),
    )


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
