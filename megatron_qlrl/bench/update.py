"""Measures one optimizer update with the prompt computed once, against once for each response, and
against the least that its FLOPs can take on this machine.

Both sides are the same code on the same tokens, and their gradients must agree. The separate side
packs rows, too, with its best micro-batch size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_qlrl.bench.floor import update_floor
from megatron_qlrl.bench.measure import compare, measure, report
from megatron_qlrl.bench.policy import LOSS, make_group, random_policy
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.packing.distribute import group_rows
from megatron_qlrl.plan.flops import block_flops, separate_flops
from megatron_qlrl.policy.policy import Policy


def bench_update(
    shape: ModelShape,
    *,
    prompt_tokens: int,
    response_tokens: int,
    group: int,
    rounds: int,
) -> dict[str, Any]:
    """Returns medians of both sides, `speedup`, `flop_ratio`, `peak_memory_ratio`, errors, and:

    floor: see `update_floor`.
    share_of_floor: its seconds over those of the shared side.
    host_share: making the micro-batches from packed rows, over the shared side's seconds.

    `grad_rel_error` is the norm of the gradients' difference over the norm of the gradient, of all
    parameters together; `max_grad_rel_error` is the largest of any parameter.
    """
    made = make_group(
        vocab=shape.vocab_size,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        group=group,
    )
    each = prompt_tokens + response_tokens
    rows = partial(group_rows, made, cost=partial(block_flops, shape))
    shared = rows(max_tokens=each + response_tokens * (group - 1), share_prompt=True)
    separate = {n: rows(max_tokens=n * each, share_prompt=False) for n in (1, 2, 4) if n <= group}
    with random_policy(shape) as policy:
        # With a learning rate of 0 the weights do not change, and all rounds compute the same.
        update = partial(policy.update, loss=LOSS, lr=0.0)
        measure(partial(update, shared))  # warm-up
        best = min(separate, key=lambda n: _seconds(partial(update, separate[n])))
        sides = {"shared": partial(update, shared), "separate": partial(update, separate[best])}
        costs = compare(sides, rounds=rounds)
        error, largest = _difference(policy, *sides.values())
        host_s = measure(lambda: [policy.shard(row) for row in shared]).work_s
        dtype = next(policy.model.parameters()).dtype
    lengths = [response_tokens] * group
    floor = update_floor(shape, prompt=prompt_tokens, responses=lengths, dtype=dtype, rounds=rounds)
    ratio = separate_flops(shape, prompt_tokens, lengths) / block_flops(
        shape, prompt_tokens, lengths
    )
    speedup = costs["separate"].work_s / costs["shared"].work_s
    return {
        "bench": "update",
        "speedup": speedup,
        "flop_ratio": ratio,
        "speedup_over_flop_ratio": speedup / ratio,
        "floor": floor,
        "share_of_floor": floor["seconds"] / costs["shared"].work_s,
        "host_share": host_s / costs["shared"].work_s,
        "max_grad_rel_error": largest,
        "grad_rel_error": error,
        "peak_memory_ratio": costs["separate"].peak_bytes / costs["shared"].peak_bytes,
        "separate_responses_per_row": best,
        **report(costs),
    }


def _seconds(update: Callable[[], Any]) -> float:
    """Returns the duration of an update, which is infinite if its rows do not fit into memory."""
    try:
        return measure(update).work_s
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return float("inf")


def _difference(
    policy: Policy, left: Callable[[], Any], right: Callable[[], Any]
) -> tuple[float, float]:
    """Returns the relative difference of two updates' gradients: of all parameters together, and
    the largest of any parameter."""

    def gradients(update: Callable[[], Any]) -> dict[str, torch.Tensor]:
        update()
        return {n: p.main_grad.double() for n, p in policy.model.named_parameters()}  # pyright: ignore

    ours, theirs = gradients(left), gradients(right)
    apart = {name: float((ours[name] - theirs[name]).norm()) for name in ours}
    norms = {name: float(theirs[name].norm()) for name in ours}
    total = sum(d**2 for d in apart.values()) ** 0.5 / sum(n**2 for n in norms.values()) ** 0.5
    return total, max(apart[name] / norms[name] for name in ours)
