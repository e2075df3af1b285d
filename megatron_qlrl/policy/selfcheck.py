"""First use checks itself: a slice of the batch as shared rows must equal separate rows, layer
by layer, forward and backward, with this machine's kernels and this job's layout.

Forward, the outputs of every layer at the response tokens are compared. Backward, the gradient
of the separate rows is subtracted from that of the shared rows inside the gradient buffers (the
separate rows' loss weights are negated), so that no second copy of the gradients is needed.

FP8 is off meanwhile: it rounds by blocks of tokens, which sharing moves (with e4m3 emulated on a
CPU, layers then differ by 0.04 to 0.07, in bfloat16 by 0.01).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_qlrl.errors import KernelError
from megatron_qlrl.parallel.collectives import gather_objects
from megatron_qlrl.parallel.context import Axis
from megatron_qlrl.platform.device import has_gpu
from megatron_qlrl.platform.machine import attention_kernel
from megatron_qlrl.platform.megatron_cpu import megatron_device
from megatron_qlrl.policy.loss import sft_loss
from megatron_qlrl.policy.step import Policy, training_loss
from megatron_qlrl.types import PackedRow

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Relative difference of a layer that is let pass; a wrong merge of pieces gives about 1. That of
bfloat16 has not been measured on a GPU yet."""


def check_sharing(
    policy: Policy, shared: Sequence[PackedRow], separate: Sequence[PackedRow]
) -> None:
    """Both sides hold the same responses to the same prompts. Collective; weights, optimizer and
    version stay as they are, gradients are zero afterwards.

    Raises:
        KernelError: on every rank, naming the first layer whose output differs, or else the last
            layer whose gradient does (an error spreads upwards in the forward pass, downwards in
            the backward pass).
    """
    with _without_fp8(policy.model.config):
        outputs = _agreed(_output_differences(policy, shared, separate))
        gradients = _agreed(_gradient_differences(policy, shared, separate))
    allowed = TOLERANCE[policy.model.config.params_dtype]
    # A comparison with NaN is false: what counts is that a difference is NOT small.
    wrong = [layer for layer in sorted(outputs) if not outputs[layer] <= allowed]
    if wrong:
        _refuse("output", wrong[0], outputs[wrong[0]], allowed)
    wrong = [layer for layer in sorted(gradients) if not gradients[layer] <= allowed]
    if wrong:
        _refuse("gradient", wrong[-1], gradients[wrong[-1]], allowed)


@contextmanager
def _without_fp8(config: Any) -> Iterator[None]:
    fp8, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = fp8


def _refuse(what: str, layer: int, difference: float, allowed: float) -> None:
    kernel = attention_kernel(gpu=has_gpu())
    raise KernelError(
        f"self-check: with the attention kernel {kernel.name}, the {what} of layer {layer} with "
        f"shared prompts differs from that with separate rows by {difference:.1e} (allowed: "
        f"{allowed:.0e}). Set policy.share_prompts=false to train without sharing, and compare "
        "the versions that `qlrl check` prints with those in the README"
    )


def _agreed(mine: dict[int, float]) -> dict[int, float]:
    """For each layer the largest difference that any rank found."""
    found: dict[int, float] = {}
    for part in gather_objects(mine):
        for layer, difference in part.items():
            worst = max(found.get(layer, 0.0), difference)
            found[layer] = difference if np.isnan(difference) else worst
    return found


def _output_differences(
    policy: Policy, shared: Sequence[PackedRow], separate: Sequence[PackedRow]
) -> dict[int, float]:
    ours, theirs = (_response_states(policy, rows) for rows in (shared, separate))
    return {
        layer: float((ours[layer] - theirs[layer]).norm() / theirs[layer].norm())
        for layer in theirs
    }


def _response_states(policy: Policy, rows: Sequence[PackedRow]) -> dict[int, torch.Tensor]:
    """Each layer's output at all response tokens, in the order of (group, sample)."""
    with _recorded_outputs(policy) as outputs:
        policy.add_logprobs(rows, "self_check")
    found = {}
    for layer, states in outputs.items():
        parts = {}
        for row, local in zip(rows, states, strict=True):
            whole = _whole_row(policy, row, local)
            for block in row.blocks:
                for sample, (start, end) in zip(block.samples, block.responses, strict=True):
                    parts[block.group, sample] = whole[start:end]
        found[layer] = torch.cat([parts[key] for key in sorted(parts)])
    return found


@contextmanager
def _recorded_outputs(policy: Policy) -> Iterator[dict[int, list[torch.Tensor]]]:
    found: dict[int, list[torch.Tensor]] = {}

    def record(number: int, module: Any, args: Any, output: Any) -> None:
        found.setdefault(number, []).append(output[0].detach()[:, 0])

    layers: Any = policy.model.decoder.layers
    hooks = [layer.register_forward_hook(partial(record, layer.layer_number)) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _whole_row(policy: Policy, row: PackedRow, local: torch.Tensor) -> torch.Tensor:
    """A row's states [T, hidden] from what this rank holds of them."""
    if policy.model.config.sequence_parallel:
        local = _gather(local, policy.context.tp)
    states = _gather(local, policy.context.cp)
    index = policy.shard(row).kv_index
    return states if index is None else states[torch.from_numpy(index).to(states.device)]


def _gather(local: torch.Tensor, axis: Axis) -> torch.Tensor:
    whole = local.new_empty(axis.size * len(local), *local.shape[1:])
    dist.all_gather_into_tensor(whole, local.contiguous(), group=axis.group)
    return whole


def _gradient_differences(
    policy: Policy, shared: Sequence[PackedRow], separate: Sequence[PackedRow]
) -> dict[int, float]:
    def negated(row: PackedRow) -> PackedRow:
        return replace(row, columns={**row.columns, "weights": -row.columns["weights"]})

    config = policy.model.config
    finalize, config.finalize_model_grads_func = config.finalize_model_grads_func, None
    policy.wrapped.train()
    with megatron_device():
        policy.clear_gradients()
        policy.run(shared, partial(training_loss, sft_loss), forward_only=False)
        whole = _gradient_norms(policy)
        policy.run([negated(r) for r in separate], partial(training_loss, sft_loss),
                   forward_only=False)  # fmt: skip
        rest = _gradient_norms(policy)
        policy.clear_gradients()
    config.finalize_model_grads_func = finalize
    return {layer: rest[layer] / whole[layer] for layer in whole}


def _gradient_norms(policy: Policy) -> dict[int, float]:
    """Norm of each layer's gradient (of this rank's shards), summed over the ranks that hold
    parts of it."""
    squares: dict[int, float] = {}
    layers: Any = policy.model.decoder.layers
    for layer in layers:
        for parameter in layer.parameters():
            total = parameter.main_grad.clone()
            axes = [policy.context.cp, policy.context.dp]
            if getattr(parameter, "sequence_parallel", False):
                axes.append(policy.context.tp)
            for axis in axes:
                dist.all_reduce(total, group=axis.group)
            square = float(total.double().norm() ** 2)
            squares[layer.layer_number] = squares.get(layer.layer_number, 0.0) + square
    return {layer: square**0.5 for layer, square in squares.items()}
