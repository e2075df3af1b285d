"""Groups -> packed rows: one prompt, then its responses; several such blocks in a row."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from megatron_qlrl.errors import ConfigError
from megatron_qlrl.packing.balance import fewest_bins
from megatron_qlrl.types import Block, PackedRow, TrainGroup, TrainResponse

Aggregation = Literal["token_mean", "sequence_mean", "group_mean", "constant"]
# One unit of packing: a group's index and the indices of the responses that stay together.
Part = tuple[int, tuple[int, ...]]


def token_loss_weights(
    groups: Sequence[TrainGroup], aggregation: Aggregation, *, constant_tokens: int
) -> list[list[float]]:
    """Loss weight of each token of each response, from counts of the WHOLE optimizer batch.

    token_mean: 1 / total response tokens (DAPO). sequence_mean: 1 / (responses * own length)
    (GRPO). group_mean: 1 / (groups * tokens of all the group's responses) (QwenLong-L1.5, arXiv
    2512.12967, Eq. 4); groups without a response do not count. constant: 1 / (responses *
    constant_tokens) (Dr. GRPO). Empty responses count as responses and have no tokens to weigh.
    (verl's seq-mean-token-mean leaves them out: there the mean over the others is larger by
    responses / responses that are not empty.)
    """
    lengths = [[len(r.token_ids) for r in g.responses] for g in groups]
    num_tokens = sum(map(sum, lengths))
    num_responses = sum(map(len, lengths))
    if aggregation == "token_mean":
        return [[1.0 / max(num_tokens, 1) for _ in group] for group in lengths]
    if aggregation == "sequence_mean":
        return [[1.0 / (num_responses * max(n, 1)) for n in group] for group in lengths]
    if aggregation == "group_mean":
        num_groups = sum(map(bool, lengths))
        return [[1.0 / (num_groups * max(sum(group), 1)) for _ in group] for group in lengths]
    return [[1.0 / (num_responses * constant_tokens) for _ in group] for group in lengths]


def split_groups(
    groups: Sequence[TrainGroup], *, max_tokens: int, share_prompts: bool
) -> list[Part]:
    """Parts that each fit in a row, repeating a prompt as few times as possible.

    Raises:
        ConfigError: a prompt with one of its responses is longer than `max_tokens`.
    """
    parts: list[Part] = []
    for index, group in enumerate(groups):
        room = max_tokens - len(group.prompt_ids)
        lengths = [len(r.token_ids) for r in group.responses]
        longest = max(lengths, default=0)
        if lengths and longest > room:
            raise ConfigError(
                f"a prompt of {len(group.prompt_ids)} tokens with a response of {longest} does "
                f"not fit in policy.max_tokens_per_row={max_tokens}; raise it to at least "
                f"{len(group.prompt_ids) + longest}"
            )
        alone = [[k] for k in range(len(lengths))]
        bins = fewest_bins(lengths, cap=room) if share_prompts else alone
        parts += [(index, tuple(sorted(members))) for members in bins]
    return parts


def slice_group(
    group: TrainGroup, *, prompt_tokens: int, responses: int, response_tokens: int
) -> TrainGroup:
    """The end of the prompt with the beginnings of the first responses that are not empty."""
    kept = [r for r in group.responses if len(r.token_ids)][:responses]
    return TrainGroup(
        group.prompt_ids[-prompt_tokens:],
        tuple(TrainResponse(r.token_ids[:response_tokens], r.advantage) for r in kept),
    )


def part_tokens(groups: Sequence[TrainGroup], part: Part) -> int:
    index, samples = part
    group = groups[index]
    return len(group.prompt_ids) + sum(len(group.responses[k].token_ids) for k in samples)


def empty_row() -> PackedRow:
    """A row that trains on nothing: every rank must take part in every step's collectives."""
    zero = np.zeros(1, np.int32)
    none = np.zeros(0, np.float32)
    block = Block(group=-1, samples=(), prompt=(0, 1), responses=())
    names: tuple[str, ...] = ("loss_weights", "response_weights", "advantages")
    return PackedRow(zero, zero, (block,), dict.fromkeys(names, none))


def build_row(
    groups: Sequence[TrainGroup],
    parts: Sequence[Part],
    weights: Mapping[str, Sequence[Sequence[float]]],
) -> PackedRow:
    """One row of the given parts, in this order.

    Args:
        weights: by column, as from `token_loss_weights`.

    The row has a column `old_logprobs` if any of its responses has them; it is NaN for the tokens
    of the others, which `Policy.add_logprobs` or the loss fills in.
    """
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    blocks: list[Block] = []
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*weights, "advantages")}
    responses = [groups[index].responses[k] for index, samples in parts for k in samples]
    has_old = any(response.old_logprobs is not None for response in responses)
    cursor = 0
    for index, samples in parts:
        group = groups[index]
        num_prompt = len(group.prompt_ids)
        prompt = (cursor, cursor + num_prompt)
        tokens.append(group.prompt_ids)
        positions.append(np.arange(num_prompt))
        cursor += num_prompt
        ranges: list[tuple[int, int]] = []
        for k in samples:
            response = group.responses[k]
            n = len(response.token_ids)
            tokens.append(response.token_ids)
            positions.append(np.arange(num_prompt, num_prompt + n))
            for name, values in weights.items():
                columns[name].append(np.full(n, values[index][k]))
            columns["advantages"].append(np.full(n, response.advantage))
            if response.engine_logprobs is not None:
                columns.setdefault("engine_logprobs", []).append(response.engine_logprobs)
            if has_old:
                old = response.old_logprobs
                old = np.full(n, np.nan) if old is None else old
                columns.setdefault("old_logprobs", []).append(old)
            ranges.append((cursor, cursor + n))
            cursor += n
        blocks.append(Block(index, samples, prompt, tuple(ranges)))
    return PackedRow(
        np.concatenate(tokens).astype(np.int32),
        np.concatenate(positions).astype(np.int32),
        tuple(blocks),
        _concatenate(columns),
    )


def _concatenate(columns: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    return {
        name: np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)
        for name, parts in columns.items()
    }
