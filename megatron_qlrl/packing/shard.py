"""One row -> what each context-parallel rank computes of it.

Every span (a prompt, a response, or a prompt with its only response) is cut into 2*cp chunks
of nearly equal length and rank r takes chunks r and 2*cp-1-r (zigzag), which balances causal
attention. Chunks may be empty, so spans shorter than 2*cp need no special case. All ranks pad
their local tokens to the same length, because keys and values are gathered over cp.
"""

from collections.abc import Iterator

import numpy as np

from megatron_qlrl.types import Block, MicroBatch, PackedRow, Piece


def shard_row(row: PackedRow, *, cp_size: int, cp_rank: int, multiple_of: int = 1) -> MicroBatch:
    """The micro-batch of rank `cp_rank`; local length is padded to a multiple of `multiple_of`
    (sequence parallelism, FP8) with tokens that nothing attends to and that attend to nothing."""
    chunks = [_chunks(row, cp_size, rank) for rank in range(cp_size)]
    owned = [_positions(c) for c in chunks]
    longest = max(len(o) for o in owned)
    length = -(-longest // multiple_of) * multiple_of

    local_of_row = np.full(row.num_tokens, -1, np.int64)
    local_of_row[owned[cp_rank]] = np.arange(len(owned[cp_rank]))
    kv_index = np.empty(row.num_tokens, np.int64)
    for rank, positions in enumerate(owned):
        kv_index[positions] = rank * length + np.arange(len(positions))
    identity = cp_size == 1 and length == row.num_tokens

    hidden, targets, slots = _predictions(row, local_of_row)
    lengths = [end - start for block in row.blocks for start, end in block.responses]
    return MicroBatch(
        token_ids=_padded(row.token_ids[owned[cp_rank]], length),
        position_ids=_padded(row.position_ids[owned[cp_rank]], length),
        kv_index=None if identity else kv_index,
        pieces=tuple(_pieces(row, chunks[cp_rank])),
        hidden_index=hidden,
        target_ids=targets,
        slots=slots,
        responses=np.repeat(np.arange(len(lengths)), lengths)[slots],
        num_responses=len(lengths),
        columns={name: values[slots] for name, values in row.columns.items()},
    )


def _spans(block: Block) -> list[tuple[int, int]]:
    """Token ranges that are causal in themselves; a lone response continues its prompt's."""
    if len(block.responses) == 1:
        return [(block.prompt[0], block.responses[0][1])]
    return [block.prompt, *block.responses]


def _chunks(row: PackedRow, cp_size: int, rank: int) -> list[tuple[int, tuple[int, int], int, int]]:
    """(block index, span, start, end) of the non-empty chunks of `rank`, in local order."""
    chunks: list[tuple[int, tuple[int, int], int, int]] = []
    for index, block in enumerate(row.blocks):
        for span in _spans(block):
            bounds = [
                span[0] + (span[1] - span[0]) * i // (2 * cp_size) for i in range(2 * cp_size + 1)
            ]
            own = [(bounds[i], bounds[i + 1]) for i in (rank, 2 * cp_size - 1 - rank)]
            if own[0][1] == own[1][0]:  # neighbours (always so at cp 1): one chunk
                own = [(own[0][0], own[1][1])]
            chunks += [(index, span, start, end) for start, end in own if start < end]
    return chunks


def _positions(chunks: list[tuple[int, tuple[int, int], int, int]]) -> np.ndarray:
    ranges = [np.arange(start, end) for _, _, start, end in chunks]
    return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)


def _pieces(row: PackedRow, chunks: list[tuple[int, tuple[int, int], int, int]]) -> Iterator[Piece]:
    cursor = 0
    on_prompt: dict[int, list[int]] = {}
    for index, span, start, end in chunks:
        block = row.blocks[index]
        if span[0] < start:
            yield Piece(cursor, cursor + end - start, span[0], start, causal=False)
        yield Piece(cursor, cursor + end - start, start, end, causal=True)
        if len(block.responses) > 1 and span != block.prompt:
            first, _ = on_prompt.setdefault(index, [cursor, cursor])
            on_prompt[index] = [first, cursor + end - start]
        cursor += end - start
    # The local tokens of a block's responses are neighbours, so all of them look at the
    # prompt in one call.
    for index, (first, last) in on_prompt.items():
        prompt = row.blocks[index].prompt
        yield Piece(first, last, prompt[0], prompt[1], causal=False)


def _predictions(
    row: PackedRow, local_of_row: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(local predicting position, target token, slot) of the response tokens predicted here.

    The first token of every response is predicted from the prompt's last position.
    """
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for block in row.blocks:
        for start, end in block.responses:
            if start < end:
                predictors.append(
                    np.concatenate([[block.prompt[1] - 1], np.arange(start, end - 1)])
                )
                targets.append(row.token_ids[start:end])
    if not predictors:
        none = np.zeros(0, np.int64)
        return none, none, none
    local = local_of_row[np.concatenate(predictors)]
    slots = np.flatnonzero(local >= 0)
    return local[slots], np.concatenate(targets)[slots].astype(np.int64), slots


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values, (0, length - len(values))).astype(np.int64)
