"""Packed rows: the worked example, loss weights by hand, and what holds for any batch."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qlrl.errors import ConfigError
from megatron_qlrl.packing.balance import first_fit
from megatron_qlrl.packing.rows import (
    build_row,
    empty_row,
    part_tokens,
    slice_group,
    split_groups,
    token_loss_weights,
)
from megatron_qlrl.types import Block, TrainGroup, TrainResponse

LENGTHS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(0, 6), max_size=6)), max_size=6
)


def groups_of(lengths: Sequence[tuple[int, Sequence[int]]]) -> list[TrainGroup]:
    """(prompt tokens, response tokens) -> groups whose token ids are all different."""
    number = 0

    def take(n: int) -> np.ndarray:
        nonlocal number
        number += n
        return np.arange(number - n, number, dtype=np.int32)

    found = []
    for i, (prompt, responses) in enumerate(lengths):
        ids = take(prompt)
        made = []
        for k, n in enumerate(responses):
            tokens = take(n)
            made.append(TrainResponse(tokens, i + k / 10, -tokens.astype(np.float32)))
        found.append(TrainGroup(ids, tuple(made)))
    return found


def test_worked_example() -> None:
    """A prompt of 5 tokens with responses of 2 and 3 is one row of 10 (types.py)."""
    group = TrainGroup(
        np.array([10, 11, 12, 13, 14], np.int32),
        (
            TrainResponse(np.array([20, 21], np.int32), 1.5, np.array([-1, -2], np.float32)),
            TrainResponse(np.array([30, 31, 32], np.int32), -0.5, -np.ones(3, np.float32)),
        ),
    )
    row = build_row([group], [(0, (0, 1))], {"loss_weights": [[0.25, 0.5]]})
    assert row.token_ids.tolist() == [10, 11, 12, 13, 14, 20, 21, 30, 31, 32]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7]
    assert row.blocks == (Block(0, (0, 1), (0, 5), ((5, 7), (7, 10))),)
    assert {name: values.tolist() for name, values in row.columns.items()} == {
        "loss_weights": [0.25, 0.25, 0.5, 0.5, 0.5],
        "advantages": [1.5, 1.5, -0.5, -0.5, -0.5],
        "engine_logprobs": [-1, -2, -1, -1, -1],
    }
    assert (row.num_tokens, row.num_response_tokens) == (10, 5)
    assert row.token_ids.dtype == row.position_ids.dtype == np.int32
    assert all(values.dtype == np.float32 for values in row.columns.values())


def test_second_block_starts_again_at_position_zero() -> None:
    groups = groups_of([(2, [1]), (3, [2])])
    row = build_row(groups, [(1, (0,)), (0, (0,))], {"loss_weights": [[1.0], [1.0]]})
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert row.token_ids.tolist() == [3, 4, 5, 6, 7, 0, 1, 2]
    assert row.blocks == (Block(1, (0,), (0, 3), ((3, 5),)), Block(0, (0,), (5, 7), ((7, 8),)))


def test_without_engine_logprobs_there_is_no_such_column() -> None:
    group = TrainGroup(np.zeros(1, np.int32), (TrainResponse(np.zeros(2, np.int32), 1.0),))
    row = build_row([group], [(0, (0,))], {"loss_weights": [[1.0]]})
    assert set(row.columns) == {"loss_weights", "advantages"}


def test_old_logprobs_are_a_column_where_any_response_has_them() -> None:
    """NaN marks the tokens whose log-probs the present weights give."""
    new, waited = groups_of([(1, [1, 2]), (1, [2])])
    (response,) = waited.responses
    kept = np.array([-0.5, -0.25], np.float32)
    groups = [new, replace(waited, responses=(replace(response, old_logprobs=kept),))]
    weights = {"loss_weights": token_loss_weights(groups, "token_mean", constant_tokens=1)}
    row = build_row(groups, [(0, (0, 1)), (1, (0,))], weights)
    old = row.columns["old_logprobs"]
    assert old.dtype == np.float32
    np.testing.assert_array_equal(old, [np.nan, np.nan, np.nan, -0.5, -0.25])
    assert "old_logprobs" not in build_row(groups, [(0, (0, 1))], weights).columns


def test_loss_weights_by_hand() -> None:
    groups = groups_of([(3, [2, 6]), (1, [0, 4])])  # 12 tokens in 4 responses, one empty
    weights = {
        kind: token_loss_weights(groups, kind, constant_tokens=10)
        for kind in ("token_mean", "sequence_mean", "group_mean", "constant")
    }
    assert weights["token_mean"] == [[1 / 12, 1 / 12], [1 / 12, 1 / 12]]
    assert weights["sequence_mean"] == [[1 / 8, 1 / 24], [1 / 4, 1 / 16]]
    assert weights["group_mean"] == [[1 / 16, 1 / 16], [1 / 8, 1 / 8]]
    assert weights["constant"] == [[1 / 40, 1 / 40], [1 / 40, 1 / 40]]


def test_loss_weights_of_nothing() -> None:
    only_empty = groups_of([(3, [0, 0]), (2, [])])
    assert token_loss_weights(only_empty, "token_mean", constant_tokens=1) == [[1.0, 1.0], []]
    assert token_loss_weights([], "sequence_mean", constant_tokens=1) == []
    assert token_loss_weights([], "constant", constant_tokens=1) == []
    assert token_loss_weights([], "group_mean", constant_tokens=1) == []


def test_a_group_without_responses_is_no_group_in_their_mean() -> None:
    groups = groups_of([(3, [2, 2]), (1, []), (1, [5])])
    weights = token_loss_weights(groups, "group_mean", constant_tokens=1)
    assert weights == [[1 / 8, 1 / 8], [], [1 / 10]]


def test_group_larger_than_the_cap_repeats_its_prompt_as_rarely_as_possible() -> None:
    groups = groups_of([(4, [3, 6, 2, 5, 4])])  # 20 response tokens, room for 10 in a row
    parts = split_groups(groups, max_tokens=14, share_prompts=True)
    assert parts == [(0, (1, 4)), (0, (0, 2, 3))]  # 6 + 4 and 5 + 3 + 2
    assert [part_tokens(groups, p) for p in parts] == [14, 14]


def test_group_that_fits_stays_whole() -> None:
    groups = groups_of([(4, [3, 6, 2]), (1, [1])])
    parts = split_groups(groups, max_tokens=15, share_prompts=True)
    assert parts == [(0, (0, 1, 2)), (1, (0,))]


def test_without_sharing_every_response_has_its_own_prompt() -> None:
    groups = groups_of([(4, [3, 6])])
    assert sorted(split_groups(groups, max_tokens=99, share_prompts=False)) == [
        (0, (0,)),
        (0, (1,)),
    ]


@pytest.mark.parametrize(("prompt", "responses", "need"), [(6, [1, 5], 11), (11, [0], 11)])
def test_response_that_cannot_fit_is_the_users_error(
    prompt: int, responses: list[int], need: int
) -> None:
    message = rf"max_tokens_per_row=10; raise it to at least {need}"
    with pytest.raises(ConfigError, match=message):
        split_groups(groups_of([(prompt, responses)]), max_tokens=10, share_prompts=True)


def test_slice_takes_the_prompts_end_and_the_responses_beginnings() -> None:
    (group,) = groups_of([(5, [3, 0, 1, 4, 2])])  # ids 0-4 | 5 6 7 | | 8 | 9-12 | 13 14
    found = slice_group(group, prompt_tokens=2, responses=3, response_tokens=2)
    assert found.prompt_ids.tolist() == [3, 4]
    assert [r.token_ids.tolist() for r in found.responses] == [[5, 6], [8], [9, 10]]


def test_empty_row_trains_on_nothing() -> None:
    row = empty_row()
    assert (row.num_tokens, row.num_response_tokens) == (1, 0)
    assert {name: len(values) for name, values in row.columns.items()} == {
        "loss_weights": 0,
        "response_weights": 0,
        "advantages": 0,
    }


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 20), st.booleans())
def test_rows_hold_every_response_once_and_keep_the_cap(
    lengths: list[tuple[int, list[int]]], spare: int, share: bool
) -> None:
    groups = groups_of(lengths)
    need = max((p + n for p, ns in lengths for n in ns), default=1)
    cap = need + spare
    parts = split_groups(groups, max_tokens=cap, share_prompts=share)
    weights = [[i + k / 8 for k in range(len(g.responses))] for i, g in enumerate(groups)]
    sizes = [part_tokens(groups, part) for part in parts]
    filled = [[parts[i] for i in row] for row in first_fit(sizes, cap=cap)]
    rows = [build_row(groups, row, {"loss_weights": weights}) for row in filled]
    found = []
    for row in rows:
        assert row.num_tokens == len(row.position_ids) <= cap
        cursor = slot = 0
        for block in row.blocks:
            group = groups[block.group]
            start, end = block.prompt
            assert start == cursor  # blocks cover the row completely
            assert row.token_ids[start:end].tolist() == group.prompt_ids.tolist()
            assert row.position_ids[start:end].tolist() == list(range(end - start))
            cursor = end
            for k, (start, end) in zip(block.samples, block.responses, strict=True):
                assert start == cursor
                response = group.responses[k]
                n = len(response.token_ids)
                assert row.token_ids[start:end].tolist() == response.token_ids.tolist()
                first = len(group.prompt_ids)
                assert row.position_ids[start:end].tolist() == list(range(first, first + n))
                here = slice(slot, slot + n)
                want = np.full(n, weights[block.group][k], np.float32)
                np.testing.assert_array_equal(row.columns["loss_weights"][here], want)
                want = np.full(n, response.advantage, np.float32)
                np.testing.assert_array_equal(row.columns["advantages"][here], want)
                engine = row.columns["engine_logprobs"][here]
                np.testing.assert_array_equal(engine, response.engine_logprobs)
                found.append((block.group, k))
                cursor, slot = end, slot + n
        assert cursor == row.num_tokens
        assert slot == row.num_response_tokens
        assert all(len(values) == slot for values in row.columns.values())
    assert sorted(found) == [(i, k) for i, (_, ns) in enumerate(lengths) for k in range(len(ns))]
