"""Responses that go on over several steps, each round with the weights of its step.

A response that reaches the step's budget of tokens waits with its group. In the next step the
engine reads the prompt and the tokens so far as one prompt, and samples on from there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_qlrl.rollout.vllm_engine import Completion, Request
from megatron_qlrl.types import Budget, Prompt, Rollout, ScoredGroup


@dataclass(frozen=True)
class Task:
    """What the engine samples of one response in a step.

    Attributes:
        start: what earlier steps sampled; None for a new response.
        ends: the response ends with this request, because its limit is that of the response.
    """

    prompt: Prompt
    sample: int
    start: Rollout | None
    request: Request
    ends: bool

    def rollout(
        self, completion: Completion, *, version: int, decode: Callable[[Sequence[int]], str]
    ) -> Rollout:
        """The response with the tokens that weights of `version` have added."""
        start, versions = self.start, None
        token_ids, logprobs = completion.token_ids, completion.logprobs
        if start is not None:
            versions = np.append(start.token_versions, np.full(len(token_ids), version, np.int32))
            token_ids = np.append(start.token_ids, token_ids)
            logprobs = np.append(start.engine_logprobs, logprobs)
        return Rollout(
            prompt_uid=self.prompt.uid,
            sample=self.sample,
            token_ids=token_ids,
            engine_logprobs=logprobs,
            text=decode(token_ids.tolist()),
            finished=completion.finished,
            weight_version=version if start is None else start.weight_version,
            versions=versions,
            goes_on=not completion.finished and not self.ends,
        )


def next_task(
    prompt: Prompt, sample: int, budget: Budget | None, *, max_tokens: int, seed: int
) -> Task:
    """The next round of a response that has at most `max_tokens` in all."""
    group = None if budget is None else budget.begun.get(prompt.uid)
    start = None if group is None else group.rollouts[sample]
    left, prompt_ids = max_tokens, prompt.token_ids
    if start is not None:
        # At least one, because a run may go on with a smaller limit than it began with.
        left = max(max_tokens - len(start.token_ids), 1)
        prompt_ids = np.concatenate([prompt_ids, start.token_ids])
    tokens = None if budget is None else budget.tokens_of(prompt.uid)
    limit = left if tokens is None else min(tokens, left)
    return Task(prompt, sample, start, Request(prompt_ids, seed, limit), ends=limit == left)


def known_logprobs(begun: ScoredGroup, rollouts: Sequence[Rollout]) -> tuple[np.ndarray, ...]:
    """The old log-probs of a group that went on: NaN for the tokens of this step."""
    assert begun.old_logprobs is not None
    return tuple(
        np.append(old, np.full(len(rollout.token_ids) - len(old), np.nan, np.float32))
        for old, rollout in zip(begun.old_logprobs, rollouts, strict=True)
    )
