"""Measures time and memory of one update on one long shared row."""

import time
from functools import partial
from typing import Any

from megatron_qlrl.bench.measure import measure, report
from megatron_qlrl.bench.policy import LOSS, make_group, random_policy
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.packing.distribute import group_rows
from megatron_qlrl.parallel.collectives import gather_objects
from megatron_qlrl.plan.flops import UPDATE_TO_FORWARD, block_flops, separate_flops


def bench_row(
    shape: ModelShape, *, prompt_tokens: int, response_tokens: int, group: int, cp: int
) -> dict[str, Any]:
    """Returns time and peak memory of every rank for one update on one row (without warm-up), model
    FLOPs per second, and how many more FLOPs separate rows need. Every rank returns the same."""
    made = make_group(
        vocab=shape.vocab_size,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        group=group,
    )
    lengths = [response_tokens] * group
    tokens = prompt_tokens + sum(lengths)
    started = time.perf_counter()
    with random_policy(shape, cp=cp) as policy:
        built_s = time.perf_counter() - started
        rows = group_rows(
            made, max_tokens=tokens, share_prompt=True, cost=partial(block_flops, shape)
        )
        assert [row.num_tokens for row in rows] == [tokens]
        metrics: dict[str, float] = {}
        cost = measure(lambda: metrics.update(policy.update(rows, LOSS, lr=1e-6)))
        costs = gather_objects(cost)
    flops = UPDATE_TO_FORWARD * block_flops(shape, prompt_tokens, lengths)
    return {
        "bench": "row",
        "row_tokens": tokens,
        "cp": cp,
        "wall_s": max(c.wall_s for c in costs),
        "peak_gib_per_rank": [round(c.peak_bytes / 2**30, 3) for c in costs],
        "model_flops": flops,
        "flops_per_s": flops / max(c.wall_s for c in costs),
        "flop_ratio": separate_flops(shape, prompt_tokens, lengths) * UPDATE_TO_FORWARD / flops,
        "grad_norm": metrics["actor/grad_norm"],
        "entropy": metrics["actor/entropy"],
        "build_s": built_s,
        **report({f"rank{i}": c for i, c in enumerate(costs)}),
    }
