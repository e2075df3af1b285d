"""One frozen record per stage of the data flow.

    Prompt -> Rollout -> ScoredGroup -> TrainGroup -> PackedRow -> MicroBatch

`[P]`, `[R]`, `[T]` stand for prompt, response and row tokens; `G` for the responses of one
prompt. Token ids are numpy int32 (a list of Python ints costs nine times the memory).

Worked example: a prompt of 5 tokens with two responses of 2 and 3 tokens becomes one shared
row of T = 5 + 2 + 3 = 10 tokens. Position ids are 0..4 | 5 6 | 5 6 7: each response goes on
from the end of the prompt.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One question about one document, ready to be generated from.

    Attributes:
        uid: stable identity of the row ("<file stem>:<index>"); seeds and statistics hang on it.
        token_ids: int32 [P], the chat template applied, generation prompt included.
        data_source: verl's `data_source`; it selects the rule of the reward.
        question, ground_truth: travel as fields, never cut out of the text again.
        reasoning_open: whether the rendered prompt ends in an open `<think>`, so that a response
            must close its reasoning before its final answer counts.
        cut: whether the text lost its middle to fit (evaluation).
        end: the last characters of the last user message, for the rollout log.
    """

    uid: str
    token_ids: np.ndarray
    data_source: str
    question: str
    ground_truth: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    reasoning_open: bool = False
    cut: bool = False
    end: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Example:
    """One SFT row: a prompt and the response to imitate (int32 [R], end token included)."""

    prompt: Prompt
    response_ids: np.ndarray


@dataclass(frozen=True)
class Rollout:
    """One response that the engine sampled.

    Attributes:
        token_ids: int32 [R], end-of-sequence token included when there is one.
        engine_logprobs: float32 [R], the engine's log-probability of each sampled token,
            after temperature, over the whole vocabulary.
        text: the response decoded without special tokens.
        finished: False when the response hit the length limit.
        weight_version: number of optimizer updates that the weights had seen which sampled the
            first token; no token is older.
        versions: int32 [R], that number for each token; None where all are `weight_version`.
        goes_on: the response reached the step's budget of tokens, and goes on in a later step.
    """

    prompt_uid: str
    sample: int
    token_ids: np.ndarray
    engine_logprobs: np.ndarray
    text: str
    finished: bool
    weight_version: int
    versions: np.ndarray | None = None
    goes_on: bool = False

    @property
    def token_versions(self) -> np.ndarray:
        """int32 [R]: the version of the weights that sampled each token."""
        if self.versions is not None:
            return self.versions
        return np.full(len(self.token_ids), self.weight_version, np.int32)


@dataclass(frozen=True)
class ProbeAnswer:
    """What an engine makes of the probe, a fixed prompt of P tokens that it reads after each
    weight sync.

    Attributes:
        token_ids: int32 [P + D], the prompt and its likeliest continuation by this engine.
        logprobs: float32 [P + D - 1], of all tokens but the first, at temperature 1.
        num_prompt: P. The first P - 1 log-probs are those of the prefill.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    num_prompt: int


@dataclass(frozen=True)
class Score:
    """Reward of one response with its parts.

    Attributes:
        value: the reward, max over the parts; None means "no verdict": the sample is masked
            out of the loss and of every group statistic.
        rule: reward of the rule alone.
        judge: the judge's verdict as 0 or 1; None when it was not asked or gave none.
        matched: the notation the rule read the answer from, "" when none.
        prediction: the final answer as extracted, for the rollout log.
    """

    value: float | None
    rule: float
    judge: float | None = None
    matched: str = ""
    prediction: str = ""


@dataclass(frozen=True)
class ScoredGroup:
    """The G responses to one prompt with their scores (same order, same length).

    It is trained on when it is whole. A response that goes on has no verdict yet.

    Attributes:
        old_logprobs: float32 [R] of each response, the trainer's log-prob of each token under the
            weights that sampled it, kept where the group waits for a later step. NaN, and None for
            all tokens: the present weights sampled them.
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...]
    old_logprobs: tuple[np.ndarray, ...] | None = None

    @property
    def weight_version(self) -> int:
        """Version of the weights that sampled the first tokens, the same for all responses."""
        return self.rollouts[0].weight_version

    @property
    def whole(self) -> bool:
        """Whether every response has ended."""
        return not any(rollout.goes_on for rollout in self.rollouts)

    @property
    def rewards(self) -> np.ndarray:
        """float64 [G]; NaN where there is no verdict."""
        return np.array([np.nan if s.value is None else s.value for s in self.scores])


@dataclass(frozen=True)
class Budget:
    """How far the responses of one step go (`rollout.tokens_per_round`).

    Attributes:
        tokens: the most tokens that a response gets in this step before it waits; None: it ends.
        begun: groups that go on in this step, by the uid of their prompt.
        due: uids of the begun groups that end in this step, however many tokens they need, because
            their first tokens would get too old.
    """

    tokens: int | None
    begun: Mapping[str, ScoredGroup]
    due: Collection[str] = ()

    def tokens_of(self, uid: str) -> int | None:
        """Returns the most tokens for each response to a prompt, or None if they end."""
        return None if uid in self.due else self.tokens


@dataclass(frozen=True)
class TrainResponse:
    """One response as the loss sees it.

    Attributes:
        token_ids: int32 [R].
        advantage: the group-relative advantage of the response (SFT: 1.0).
        engine_logprobs: float32 [R], what the rollout engine reported; None outside RL.
        old_logprobs: float32 [R] where weights of the past sampled some of it (`ScoredGroup`).
    """

    token_ids: np.ndarray
    advantage: float
    engine_logprobs: np.ndarray | None = None
    old_logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class TrainGroup:
    """A prompt (int32 [P]) with the responses that are trained on."""

    prompt_ids: np.ndarray
    responses: tuple[TrainResponse, ...]


@dataclass(frozen=True)
class Block:
    """Where one prompt and some of its responses lie in a row: half-open token ranges.

    `samples[k]` says which response of group `group` lies in `responses[k]`.
    """

    group: int
    samples: tuple[int, ...]
    prompt: tuple[int, int]
    responses: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PackedRow:
    """Prompt blocks one after another, computed as one sequence without padding.

    Attributes:
        token_ids, position_ids: int32 [T]; positions of a response go on from its prompt's end.
        blocks: in row order; they cover the row completely.
        columns: float32 [N] arrays, one value for each response token in row order:
            `loss_weights`, `response_weights` and `advantages` always, `engine_logprobs`,
            `old_logprobs`, `ref_logprobs` where known. `loss_weights` holds the aggregation over
            the whole optimizer batch, so the loss is a plain weighted sum that no split can
            change. With `response_weights` a sum is the mean over the batch's responses of the
            means over their tokens.
            `old_logprobs` as packed is NaN for tokens that the present weights sampled, until
            `Policy.add_logprobs` fills it in.
    """

    token_ids: np.ndarray
    position_ids: np.ndarray
    blocks: tuple[Block, ...]
    columns: Mapping[str, np.ndarray]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_response_tokens(self) -> int:
        return sum(end - start for b in self.blocks for start, end in b.responses)

    def slices(self) -> Iterator[tuple[int, int, slice]]:
        """Group, sample and place in the columns of each response, in row order."""
        at = 0
        for block in self.blocks:
            for sample, (start, end) in zip(block.samples, block.responses, strict=True):
                yield block.group, sample, slice(at, at + end - start)
                at += end - start


@dataclass(frozen=True)
class Piece:
    """Attention of local queries [q0, q1) on the row's keys [k0, k1).

    A causal piece is square: query q0 + i sees keys k0 .. k0 + i. Pieces of the same query are
    merged by log-sum-exp.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool


@dataclass(frozen=True)
class MicroBatch:
    """One row as one context-parallel rank computes it. L local tokens (padding at the end),
    T row tokens, M response tokens whose predicting position this rank holds.

    Attributes:
        token_ids, position_ids: int64 [L].
        kv_index: int64 [T], where each row token lies in the keys gathered over cp (which
            are [cp * L]); None when that is the identity.
        pieces: the attention of the local queries.
        hidden_index: int64 [M], the local position that predicts each response token.
        target_ids: int64 [M].
        slots: int64 [M], the token's place in the row's columns.
        responses: int64 [M], the number of the token's response in the row.
        num_responses: responses of the whole row.
        columns: float32 [M], the row's columns at `slots`.
    """

    token_ids: np.ndarray
    position_ids: np.ndarray
    kv_index: np.ndarray | None
    pieces: tuple[Piece, ...]
    hidden_index: np.ndarray
    target_ids: np.ndarray
    slots: np.ndarray
    responses: np.ndarray
    num_responses: int
    columns: Mapping[str, np.ndarray]
