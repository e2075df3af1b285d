"""Measures the time training loses to a checkpoint that a thread writes, and to one waited for."""

import tempfile
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from megatron_qlrl.bench.measure import machine
from megatron_qlrl.bench.policy import LOSS, make_group, random_policy
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.packing.distribute import group_rows
from megatron_qlrl.plan.flops import block_flops
from megatron_qlrl.weights.checkpoint import CheckpointStore


def bench_checkpoint(
    shape: ModelShape, *, prompt_tokens: int, rounds: int, folder: Path | None
) -> dict[str, Any]:
    """Returns medians of `rounds`, in seconds, and `stall_ratio` = stall_s / waited_s.

    `waited_s` is the time of a save that is waited for. `stall_s` is the additional time of updates
    during a save until it is on disk. `snapshot_s` is the part of it in which training stops.

    Args:
        folder: a folder on the disk to measure; by default the system's temporary folder.
    """
    made = make_group(
        vocab=shape.vocab_size, prompt_tokens=prompt_tokens, response_tokens=16, group=8
    )
    rows = group_rows(
        made, max_tokens=shape.max_positions, share_prompt=True, cost=partial(block_flops, shape)
    )
    times: dict[str, list[float]] = {"waited_s": [], "stall_s": [], "snapshot_s": []}
    with tempfile.TemporaryDirectory(dir=folder) as out, random_policy(shape) as policy:
        torch.set_num_threads(1)  # as in the other benches; the writing thread has another core
        store = CheckpointStore(Path(out), keep=1, warn=print)
        save = partial(store.save, 1, model=policy.model, optimizer=policy.optimizer, state={})
        update = partial(policy.update, rows, LOSS, lr=1e-6)
        once = max(_seconds(update), _seconds(update))
        _seconds(save, store.wait)
        for _ in range(rounds):
            times["waited_s"].append(_seconds(save, store.wait))
            work = [update] * ceil(1.5 * times["waited_s"][-1] / once)
            alone = _seconds(*work)
            times["snapshot_s"].append(_seconds(save))
            beside = times["snapshot_s"][-1] + _seconds(*work, store.wait)
            times["stall_s"].append(beside - alone)
        size = sum(file.stat().st_size for file in Path(out).rglob("*") if file.is_file())
        store.close()
    medians = {name: median(values) for name, values in times.items()}
    return {
        "bench": "checkpoint",
        "stall_ratio": medians["stall_s"] / medians["waited_s"],
        **medians,
        "rounds": times,
        "checkpoint_bytes": size,
        "machine": machine(),
    }


def _seconds(*calls: Callable[[], Any]) -> float:
    start = perf_counter()
    for call in calls:
        call()
    return perf_counter() - start
