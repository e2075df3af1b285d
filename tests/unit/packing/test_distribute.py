"""Sharing the rows of an optimizer batch over data-parallel ranks."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qlrl.packing.distribute import make_rows
from megatron_qlrl.types import PackedRow, TrainGroup, TrainResponse

LENGTHS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(0, 6), max_size=6)), max_size=8
)


def groups_of(lengths: Sequence[tuple[int, Sequence[int]]]) -> list[TrainGroup]:
    return [
        TrainGroup(
            np.zeros(prompt, np.int32),
            tuple(TrainResponse(np.zeros(n, np.int32), 1.0) for n in responses),
        )
        for prompt, responses in lengths
    ]


def tokens(prompt: int, responses: Sequence[int]) -> float:
    return prompt + sum(responses)


def rows_of(
    groups: list[TrainGroup], ranks: int, cap: int = 99, share: bool = True
) -> list[list[PackedRow]]:
    return make_rows(
        groups,
        num_ranks=ranks,
        max_tokens=cap,
        share_prompts=share,
        aggregation="token_mean",
        constant_tokens=1,
        cost=tokens,
    )


def samples(rows: list[list[PackedRow]]) -> list[list[tuple[int, int]]]:
    """(group, response) of each rank, sorted."""
    return [
        sorted((b.group, k) for row in rank for b in row.blocks for k in b.samples) for rank in rows
    ]


def test_most_expensive_first_to_the_least_loaded_rank() -> None:
    # costs 9, 7, 6, 5, 2 by hand: 9 | 7, then 6 to the second, 5 to the first, 2 to the second
    groups = groups_of([(1, [1]), (1, [8]), (1, [5]), (1, [6]), (1, [4])])
    assert samples(rows_of(groups, 2)) == [[(1, 0), (4, 0)], [(0, 0), (2, 0), (3, 0)]]


def test_cost_decides_not_tokens() -> None:
    """Costs 100 and 1 + 1 + 1: the long prompt is alone although it has fewest tokens."""
    groups = groups_of([(1, [1]), (5, [1]), (5, [1]), (5, [1])])
    found = make_rows(
        groups,
        num_ranks=2,
        max_tokens=99,
        share_prompts=True,
        aggregation="token_mean",
        constant_tokens=1,
        cost=lambda prompt, responses: 100.0 if prompt == 1 else 1.0,
    )
    assert samples(found) == [[(0, 0)], [(1, 0), (2, 0), (3, 0)]]


def test_rank_without_work_gets_one_empty_row() -> None:
    found = rows_of(groups_of([(3, [2, 1])]), 3)
    assert samples(found) == [[(0, 0), (0, 1)], [], []]
    assert [[row.num_tokens for row in rank] for rank in found] == [[6], [1], [1]]
    assert [[row.num_response_tokens for row in rank] for rank in found] == [[3], [0], [0]]


def test_weights_count_the_whole_batch_not_the_rank() -> None:
    found = rows_of(groups_of([(3, [2]), (3, [2]), (3, [4])]), 2)
    weights = np.concatenate([row.columns["loss_weights"] for rank in found for row in rank])
    np.testing.assert_allclose(weights, np.full(8, 1 / 8))


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(0, 20), st.booleans())
def test_every_response_once_under_the_cap_and_the_same_everywhere(
    lengths: list[tuple[int, list[int]]], ranks: int, spare: int, share: bool
) -> None:
    groups = groups_of(lengths)
    cap = spare + max((p + n for p, ns in lengths for n in ns), default=1)
    found = rows_of(groups, ranks, cap, share)
    assert len(found) == ranks
    assert all(rank for rank in found)
    assert all(row.num_tokens <= cap for rank in found for row in rank)
    want = [(i, k) for i, (_, ns) in enumerate(lengths) for k in range(len(ns))]
    assert sorted(sum(samples(found), [])) == want
    again = rows_of(groups_of(lengths), ranks, cap, share)
    assert [[r.blocks for r in rank] for rank in again] == [
        [r.blocks for r in rank] for rank in found
    ]


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 5))
def test_loads_differ_by_no_more_than_one_part(prompts: list[int], ranks: int) -> None:
    """The bound of longest-processing-time-first: max - min <= the most expensive part."""
    found = rows_of(groups_of([(p, [1]) for p in prompts]), ranks)
    loads = [sum(row.num_tokens for row in rank if row.num_response_tokens) for rank in found]
    assert sum(loads) == sum(prompts) + len(prompts)
    assert max(loads) - min(loads) <= max(prompts) + 1
