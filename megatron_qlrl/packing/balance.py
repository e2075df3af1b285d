"""Partition of costs over equal workers, in pure Python.

Invariants (asserted by the tests): every item lies in exactly one bin; a bin never holds more
than the cap; the result depends on nothing but the arguments.
"""

from collections.abc import Sequence

_GOOD_ENOUGH = 1.001


def balance(costs: Sequence[float], *, num_bins: int) -> list[list[int]]:
    """Item indices for each bin: longest processing time first, then moves and swaps between the
    fullest bin and another one for as long as they lower the maximum."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0.0] * num_bins
    for item in _largest_first(costs):
        bin_ = min(range(num_bins), key=lambda b: (loads[b], b))
        bins[bin_].append(item)
        loads[bin_] += costs[item]
    while max(loads) > _GOOD_ENOUGH * sum(loads) / num_bins:
        full = loads.index(max(loads))
        better = _best_exchange(costs, bins, loads, full)
        if better is None:
            break
        gain, mine, other, theirs = better
        bins[full].remove(mine)
        bins[other].append(mine)
        if theirs is not None:
            bins[other].remove(theirs)
            bins[full].append(theirs)
        loads[full] -= gain
        loads[other] += gain
    return [sorted(b) for b in bins]


def fill(costs: Sequence[float], sizes: Sequence[int], *, cap: int) -> list[list[int]]:
    """Item indices for bins of at most `cap` in size: as few bins as first-fit decreasing finds,
    their costs evened out where the cap leaves room."""
    dense = first_fit(sizes, cap=cap)
    return _even(costs, sizes, num_bins=len(dense), cap=cap) or dense


def first_fit(sizes: Sequence[int], *, cap: int) -> list[list[int]]:
    """First-fit decreasing: item indices for bins of at most `cap`. No item is larger than it."""
    bins: list[list[int]] = []
    used: list[int] = []
    for item in _largest_first(sizes):
        assert sizes[item] <= cap, (sizes[item], cap)
        bin_ = next((b for b, u in enumerate(used) if u + sizes[item] <= cap), len(used))
        if bin_ == len(used):
            bins.append([])
            used.append(0)
        bins[bin_].append(item)
        used[bin_] += sizes[item]
    return bins


def fewest_bins(sizes: Sequence[int], *, cap: int) -> list[list[int]]:
    """Item indices for as few bins of at most `cap` as there can be (for the responses of one
    group: a search that is given up for first-fit decreasing after some 10,000 tries)."""
    best = first_fit(sizes, cap=cap)
    for num_bins in range(-(-sum(sizes) // max(cap, 1)), len(best)):
        bins = _search(sizes, num_bins=num_bins, cap=cap)
        if bins is not None:
            return bins
    return best


def _search(sizes: Sequence[int], *, num_bins: int, cap: int) -> list[list[int]] | None:
    """Depth first, largest item first; bins with the same room are tried once."""
    order = _largest_first(sizes)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room, tries = [cap] * num_bins, 10_000

    def place(depth: int) -> bool:
        nonlocal tries
        if depth == len(order):
            return True
        item, seen = order[depth], set[int]()
        for b in range(num_bins):
            if room[b] < sizes[item] or room[b] in seen or tries == 0:
                continue
            tries -= 1
            seen.add(room[b])
            bins[b].append(item)
            room[b] -= sizes[item]
            if place(depth + 1):
                return True
            bins[b].pop()
            room[b] += sizes[item]
        return False

    return bins if place(0) else None


def _even(
    costs: Sequence[float], sizes: Sequence[int], *, num_bins: int, cap: int
) -> list[list[int]] | None:
    """Longest processing time first under the cap; None when an item finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads, used = [0.0] * num_bins, [0] * num_bins
    for item in _largest_first(costs):
        roomy = [b for b in range(num_bins) if used[b] + sizes[item] <= cap]
        if not roomy:
            return None
        bin_ = min(roomy, key=lambda b: (loads[b], b))
        bins[bin_].append(item)
        loads[bin_] += costs[item]
        used[bin_] += sizes[item]
    return bins


def _largest_first(costs: Sequence[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda i: (-costs[i], i))


def _best_exchange(
    costs: Sequence[float], bins: Sequence[Sequence[int]], loads: Sequence[float], full: int
) -> tuple[float, int, int, int | None] | None:
    """(cost that leaves bin `full`, its item, the other bin, that bin's item or None) for the
    exchange after which the higher of the two loads is lowest; None when none helps."""
    best: tuple[float, int, int, int | None] | None = None
    lowest = loads[full] * (1 - 1e-9)  # a gain, not rounding
    for mine in bins[full]:
        for other in range(len(bins)):
            for theirs in (None, *bins[other]) if other != full else ():
                gain = costs[mine] - (costs[theirs] if theirs is not None else 0.0)
                peak = max(loads[full] - gain, loads[other] + gain)
                if peak < lowest:
                    lowest, best = peak, (gain, mine, other, theirs)
    return best
