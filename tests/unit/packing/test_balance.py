"""Partitions by hand, against brute force, and what holds for any input."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qlrl.packing.balance import balance, fewest_bins, fill, first_fit


def test_exchange_finds_what_longest_first_misses() -> None:
    """Longest first: 6 + 4 | 5 + 4 + 3, so 10 and 12; even are 6 + 5 and 4 + 4 + 3."""
    found = balance([6, 5, 4, 4, 3], num_bins=2)
    assert sorted(map(sorted, found)) == [[0, 1], [2, 3, 4]]


def test_fewer_items_than_bins() -> None:
    assert balance([3.0], num_bins=3) == [[0], [], []]
    assert balance([], num_bins=2) == [[], []]


def test_fill_evens_out_costs_under_the_cap() -> None:
    # First fit puts sizes 5+3 | 4+2 with costs 10+9 | 1+1; under the cap of 8 even is 5+2 | 3+4.
    assert first_fit([5, 3, 4, 2], cap=8) == [[0, 1], [2, 3]]
    found = fill([10, 9, 1, 1], [5, 3, 4, 2], cap=8)
    assert sorted(map(sorted, found)) in ([[0, 2], [1, 3]], [[0, 3], [1, 2]])
    assert max(sum([5, 3, 4, 2][i] for i in b) for b in found) <= 8


def test_fill_keeps_first_fit_where_the_even_split_finds_no_room() -> None:
    # By cost the two dearest (sizes 1, 1) go apart, and then 7 and 8 do not fit beside them.
    assert fill([9, 9, 1, 1], [1, 1, 6, 8], cap=8) == first_fit([1, 1, 6, 8], cap=8)


def test_fewest_bins_beats_first_fit() -> None:
    sizes = [4, 4, 5, 5, 5, 7]  # 30 in bins of 15: 7+4+4 | 5+5+5; first fit needs 3
    assert len(first_fit(sizes, cap=15)) == 3
    found = fewest_bins(sizes, cap=15)
    assert sorted(sorted(sizes[i] for i in b) for b in found) == [[4, 4, 7], [5, 5, 5]]


SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=6)


@settings(deadline=None)
@given(SIZES, st.integers(12, 20))
def test_fewest_bins_against_brute_force(sizes: list[int], cap: int) -> None:
    found = fewest_bins(sizes, cap=cap)
    assert sorted(i for b in found for i in b) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in b) <= cap for b in found)
    least = min(
        len(set(choice))
        for choice in product(range(len(sizes)), repeat=len(sizes))
        if all(sum(s for s, c in zip(sizes, choice, strict=True) if c == b) <= cap for b in choice)
    )
    assert len(found) == least


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 5))
def test_balance_holds_each_item_once_within_the_bound(costs: list[int], bins: int) -> None:
    found = balance(costs, num_bins=bins)
    assert len(found) == bins
    assert sorted(i for b in found for i in b) == list(range(len(costs)))
    loads = [sum(costs[i] for i in b) for b in found]
    # The bound of longest processing time first, which exchanges only improve.
    assert max(loads) <= sum(costs) / bins + max(costs, default=0) * (1 - 1 / bins) + 1e-9
    assert balance(costs, num_bins=bins) == found


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=12), st.integers(9, 20))
def test_fill_keeps_the_cap(items: list[tuple[int, int]], cap: int) -> None:
    costs, sizes = [c for c, _ in items], [s for _, s in items]
    found = fill(costs, sizes, cap=cap)
    assert sorted(i for b in found for i in b) == list(range(len(items)))
    assert all(sum(sizes[i] for i in b) <= cap for b in found)
    assert len(found) == len(first_fit(sizes, cap=cap))


def test_item_larger_than_the_cap_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        first_fit([3], cap=2)
