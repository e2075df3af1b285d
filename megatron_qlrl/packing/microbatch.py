"""Which data-parallel rank computes which rows: balanced by the model's own FLOPs.

Invariants (asserted by the tests): every response is computed exactly once; no row is longer
than the cap; the result depends on nothing but the arguments, so every rank finds the same.
"""

from collections.abc import Callable, Sequence

from megatron_qlrl.packing.rows import (
    Aggregation,
    Part,
    empty_row,
    pack_rows,
    part_tokens,
    split_groups,
    token_weight,
)
from megatron_qlrl.types import PackedRow, TrainGroup

# FLOPs of a part: (prompt tokens, response lengths) -> cost in any unit.
Cost = Callable[[int, Sequence[int]], float]


def make_rows(
    groups: Sequence[TrainGroup],
    *,
    num_ranks: int,
    max_tokens: int,
    share_prompts: bool,
    aggregation: Aggregation,
    constant_tokens: int,
    cost: Cost,
) -> list[list[PackedRow]]:
    """The rows of one optimizer batch for each of `num_ranks` data-parallel ranks.

    A rank that gets no work gets one empty row, so that it joins the step's collectives.
    """
    weights = token_weight(groups, aggregation, constant_tokens=constant_tokens)
    parts = split_groups(groups, max_tokens=max_tokens, share_prompts=share_prompts)
    shares = _balance(groups, parts, num_ranks=num_ranks, cost=cost)
    return [
        pack_rows(groups, share, weights, max_tokens=max_tokens) or [empty_row()]
        for share in shares
    ]


def _balance(
    groups: Sequence[TrainGroup], parts: Sequence[Part], *, num_ranks: int, cost: Cost
) -> list[list[Part]]:
    """Longest processing time first: the next most expensive part to the least loaded rank."""

    def price(part: Part) -> float:
        group = groups[part[0]]
        return cost(len(group.prompt_ids), [len(group.responses[k].token_ids) for k in part[1]])

    loads = [0.0] * num_ranks
    shares: list[list[Part]] = [[] for _ in range(num_ranks)]
    prices = {part: price(part) for part in parts}
    for part in sorted(parts, key=lambda p: (-prices[p], -part_tokens(groups, p), p)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], r))
        loads[rank] += prices[part]
        shares[rank].append(part)
    return shares
