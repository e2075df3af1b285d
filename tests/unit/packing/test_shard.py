"""Context-parallel shards of a row, put together again and compared with the row itself."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qlrl.packing.rows import empty_row
from megatron_qlrl.packing.shard import shard_row
from megatron_qlrl.types import Block, MicroBatch, PackedRow, Piece

# Blocks of (prompt tokens, response tokens): most are shorter than 2 * cp.
BLOCKS = st.lists(
    st.tuples(st.integers(1, 17), st.lists(st.integers(0, 11), max_size=4)),
    min_size=1,
    max_size=4,
)


def row_of(blocks: Sequence[tuple[int, Sequence[int]]]) -> PackedRow:
    """A row written without the packer; token ids are 1000 + place, columns are distinct."""
    made, positions, cursor = [], [], 0
    for index, (prompt, responses) in enumerate(blocks):
        start = cursor
        positions += range(prompt)
        cursor += prompt
        ranges = []
        for n in responses:
            ranges.append((cursor, cursor + n))
            positions += range(prompt, prompt + n)
            cursor += n
        samples = tuple(range(len(ranges)))
        made.append(Block(index, samples, (start, start + prompt), tuple(ranges)))
    slots = sum(sum(responses) for _, responses in blocks)
    columns = {
        "loss_weights": np.arange(slots, dtype=np.float32),
        "advantages": -np.arange(slots, dtype=np.float32) - 1,
    }
    tokens = np.arange(1000, 1000 + cursor, dtype=np.int32)
    return PackedRow(tokens, np.array(positions, np.int32), tuple(made), columns)


def shards_of(row: PackedRow, cp: int, multiple_of: int = 1) -> list[MicroBatch]:
    return [shard_row(row, cp_size=cp, cp_rank=rank, multiple_of=multiple_of) for rank in range(cp)]


def places(row: PackedRow, shards: list[MicroBatch]) -> list[list[int]]:
    """Row places of each rank's local tokens in local order, as `kv_index` tells them."""
    length = len(shards[0].token_ids)
    index = shards[0].kv_index
    where = np.arange(row.num_tokens) if index is None else index
    found: list[dict[int, int]] = [{} for _ in shards]
    for place, gathered in enumerate(where.tolist()):
        found[gathered // length][gathered % length] = place
    for local in found:
        assert sorted(local) == list(range(len(local)))  # padding is at the end
    return [[local[i] for i in range(len(local))] for local in found]


def wanted_mask(row: PackedRow) -> np.ndarray:
    """A token sees its own prompt and its own response, up to itself."""
    mask = np.zeros((row.num_tokens, row.num_tokens), int)
    for block in row.blocks:
        prompt = range(*block.prompt)
        for q in prompt:
            for k in prompt:
                mask[q, k] = k <= q
        for start, end in block.responses:
            for q in range(start, end):
                mask[q, block.prompt[0] : block.prompt[1]] = 1
                mask[q, start : q + 1] = 1
    return mask


def found_mask(row: PackedRow, shards: list[MicroBatch]) -> np.ndarray:
    """How often each pair is computed by all pieces of all ranks."""
    mask = np.zeros((row.num_tokens, row.num_tokens), int)
    for shard, places_here in zip(shards, places(row, shards), strict=True):
        for p in shard.pieces:
            assert p.q0 < p.q1 <= len(places_here)  # no piece touches the padding
            assert p.k0 < p.k1
            assert not p.causal or p.q1 - p.q0 == p.k1 - p.k0
            for i in range(p.q0, p.q1):
                end = p.k0 + (i - p.q0) + 1 if p.causal else p.k1
                mask[places_here[i], p.k0 : end] += 1
    return mask


def wanted_predictions(row: PackedRow) -> list[tuple[int, int]]:
    """(predicting row place, target token) of each slot."""
    found = []
    for block in row.blocks:
        for start, end in block.responses:
            for t in range(start, end):
                found.append((block.prompt[1] - 1 if t == start else t - 1, row.token_ids[t]))
    return found


@settings(deadline=None, max_examples=200)
@given(BLOCKS, st.integers(1, 4), st.integers(1, 4))
def test_shards_put_together_are_the_row(
    blocks: list[tuple[int, list[int]]], cp: int, multiple_of: int
) -> None:
    row = row_of(blocks)
    shards = shards_of(row, cp, multiple_of)

    length = len(shards[0].token_ids)
    assert length % multiple_of == 0
    owners = places(row, shards)
    assert sorted(sum(owners, [])) == list(range(row.num_tokens))
    for shard, owned in zip(shards, owners, strict=True):
        assert len(shard.token_ids) == len(shard.position_ids) == length
        padding = [0] * (length - len(owned))
        assert shard.token_ids.tolist() == row.token_ids[owned].tolist() + padding
        assert shard.position_ids.tolist() == row.position_ids[owned].tolist() + padding
        if shards[0].kv_index is None:
            assert shard.kv_index is None
        else:
            np.testing.assert_array_equal(shard.kv_index, shards[0].kv_index)

    np.testing.assert_array_equal(found_mask(row, shards), wanted_mask(row))

    want = wanted_predictions(row)
    slots = np.concatenate([shard.slots for shard in shards])
    assert sorted(slots.tolist()) == list(range(row.num_response_tokens))
    for shard, owned in zip(shards, owners, strict=True):
        predicting = [owned[i] for i in shard.hidden_index]
        found = list(zip(predicting, shard.target_ids.tolist(), strict=True))
        assert found == [want[slot] for slot in shard.slots]
        assert set(shard.columns) == {"loss_weights", "advantages"}
        assert shard.columns["loss_weights"].tolist() == shard.slots.tolist()
        assert shard.columns["advantages"].tolist() == [-slot - 1 for slot in shard.slots]


def test_worked_example_on_one_rank() -> None:
    """Prompt of 5, responses of 2 and 3 (types.py)."""
    (shard,) = shards_of(row_of([(5, [2, 3])]), 1)
    assert shard.kv_index is None
    assert set(shard.pieces) == {
        Piece(0, 5, 0, 5, causal=True),
        Piece(5, 7, 5, 7, causal=True),
        Piece(7, 10, 7, 10, causal=True),
        Piece(5, 10, 0, 5, causal=False),
    }
    assert shard.hidden_index.tolist() == [4, 5, 4, 7, 8]
    assert shard.target_ids.tolist() == [1005, 1006, 1007, 1008, 1009]
    assert shard.slots.tolist() == [0, 1, 2, 3, 4]
    assert shard.token_ids.dtype == shard.target_ids.dtype == np.int64


def test_lone_response_continues_its_prompt() -> None:
    (shard,) = shards_of(row_of([(5, [3])]), 1)
    assert shard.pieces == (Piece(0, 8, 0, 8, causal=True),)


def test_zigzag_by_hand() -> None:
    """8 tokens over 2 ranks: rank 0 has the first and the last quarter."""
    row = row_of([(3, [5])])
    first, second = shards_of(row, 2)
    assert first.token_ids.tolist() == [1000, 1001, 1006, 1007]
    assert second.token_ids.tolist() == [1002, 1003, 1004, 1005]
    assert first.position_ids.tolist() == [0, 1, 6, 7]
    assert first.kv_index is not None
    assert first.kv_index.tolist() == [0, 1, 4, 5, 6, 7, 2, 3]
    assert first.pieces == (
        Piece(0, 2, 0, 2, causal=True),
        Piece(2, 4, 0, 6, causal=False),
        Piece(2, 4, 6, 8, causal=True),
    )
    # the two middle quarters are neighbours: one chunk
    assert second.pieces == (Piece(0, 4, 0, 2, causal=False), Piece(0, 4, 2, 6, causal=True))
    # row place 2 (the prompt's last) predicts 1003, 6 predicts 1007
    assert second.hidden_index.tolist() == [0, 1, 2, 3]
    assert second.target_ids.tolist() == [1003, 1004, 1005, 1006]
    assert first.hidden_index.tolist() == [2]
    assert first.target_ids.tolist() == [1007]
    assert (first.slots.tolist(), second.slots.tolist()) == ([4], [0, 1, 2, 3])


@pytest.mark.parametrize("cp", [2, 4])
def test_row_shorter_than_the_ranks(cp: int) -> None:
    """One prompt token with one response token: most ranks hold only padding."""
    row = row_of([(1, [1])])
    shards = shards_of(row, cp)
    np.testing.assert_array_equal(found_mask(row, shards), [[1, 0], [1, 1]])
    assert {len(shard.token_ids) for shard in shards} == {1}
    assert sorted(s for shard in shards for s in shard.slots) == [0]


def test_padding_makes_the_key_index_explicit() -> None:
    """With sequence parallelism over 4, 10 tokens become 12 and the keys are no identity."""
    row = row_of([(5, [2, 3])])
    (shard,) = shards_of(row, 1, multiple_of=4)
    assert len(shard.token_ids) == 12
    assert shard.kv_index is not None
    assert shard.kv_index.tolist() == list(range(10))


@pytest.mark.parametrize("cp", [1, 3])
def test_empty_row_has_tokens_but_no_predictions(cp: int) -> None:
    for shard in shards_of(empty_row(), cp, multiple_of=2):
        assert len(shard.token_ids) == 2
        assert len(shard.slots) == len(shard.hidden_index) == len(shard.target_ids) == 0
        assert [len(values) for values in shard.columns.values()] == [0, 0, 0]


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_every_rank_knows_the_responses_of_its_tokens(cp: int) -> None:
    """Responses of 3, 0, 2 and 4 tokens to two prompts: numbers 0, 1, 2 and 3 of the row."""
    shards = shards_of(row_of([(5, [3, 0]), (2, [2, 4])]), cp)
    found = {s: r for m in shards for s, r in zip(m.slots, m.responses, strict=True)}
    assert [found[slot] for slot in range(9)] == [0, 0, 0, 2, 2, 3, 3, 3, 3]
    assert {m.num_responses for m in shards} == {4}
    empty = shard_row(empty_row(), cp_size=cp, cp_rank=0)
    assert (len(empty.responses), empty.num_responses) == (0, 0)
