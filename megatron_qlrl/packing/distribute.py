"""Which data-parallel rank computes which rows: balanced by the model's own FLOPs.

Invariants (asserted by the tests): every response is computed exactly once; no row is longer
than the cap; the result depends on nothing but the arguments, so every rank finds the same.
"""

from collections.abc import Callable, Sequence

from megatron_qlrl.packing.balance import balance, fill
from megatron_qlrl.packing.rows import (
    Aggregation,
    build_row,
    empty_row,
    part_tokens,
    split_groups,
    token_loss_weights,
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
    """The rows of one optimizer batch for each of `num_ranks` data-parallel ranks: ranks get equal
    cost, and so do the rows (micro-batches) of a rank as far as the cap allows.

    A rank that gets no work gets one empty row, so that it joins the step's collectives.
    """
    weights = {
        "loss_weights": token_loss_weights(groups, aggregation, constant_tokens=constant_tokens),
        "response_weights": token_loss_weights(groups, "sequence_mean", constant_tokens=1),
    }
    parts = split_groups(groups, max_tokens=max_tokens, share_prompts=share_prompts)
    sizes = [part_tokens(groups, part) for part in parts]
    costs: list[float] = []
    for index, samples in parts:
        group = groups[index]
        lengths = [len(group.responses[k].token_ids) for k in samples]
        costs.append(cost(len(group.prompt_ids), lengths))
    result: list[list[PackedRow]] = []
    for share in balance(costs, num_bins=num_ranks):
        rows = fill([costs[i] for i in share], [sizes[i] for i in share], cap=max_tokens)
        members = [[parts[share[i]] for i in row] for row in rows]
        result.append([build_row(groups, row, weights) for row in members] or [empty_row()])
    return result


def group_rows(
    group: TrainGroup, *, max_tokens: int, share_prompt: bool, cost: Cost
) -> list[PackedRow]:
    """The rows of one group alone on one rank, each token with the same weight."""
    (rows,) = make_rows(
        [group],
        num_ranks=1,
        max_tokens=max_tokens,
        share_prompts=share_prompt,
        aggregation="token_mean",
        constant_tokens=1,
        cost=cost,
    )
    return rows
