"""What a checkpoint takes from training: waited for, or written by a thread beside updates."""

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
    """Medians of `rounds`: `waited_s`, a save that is waited for; `stall_s`, by how much a save
    with updates beside it, until it is on disk, takes longer than the same updates alone;
    `snapshot_s`, the part of it in which training stands still; `stall_ratio`, stall_s / waited_s.

    `folder`: on the disk in question; none: the system's temporary folder.
    """
    made = make_group(
        vocab=shape.vocab_size, prompt_tokens=prompt_tokens, response_tokens=16, group=8
    )
    rows = group_rows(
        made, max_tokens=shape.max_positions, share_prompt=True, cost=partial(block_flops, shape)
    )
    found: dict[str, list[float]] = {"waited_s": [], "stall_s": [], "snapshot_s": []}
    with tempfile.TemporaryDirectory(dir=folder) as out, random_policy(shape) as policy:
        torch.set_num_threads(1)  # as in the other benches; a core is left for the thread
        store = CheckpointStore(Path(out), keep=1, warn=print)
        save = partial(store.save, 1, model=policy.model, optimizer=policy.optimizer, state={})
        update = partial(policy.update, rows, LOSS, lr=1e-6)
        once = max(_seconds(update), _seconds(update))
        _seconds(save, store.wait)
        for _ in range(rounds):
            found["waited_s"].append(_seconds(save, store.wait))
            work = [update] * ceil(1.5 * found["waited_s"][-1] / once)
            alone = _seconds(*work)
            found["snapshot_s"].append(_seconds(save))
            beside = found["snapshot_s"][-1] + _seconds(*work, store.wait)
            found["stall_s"].append(beside - alone)
        size = sum(file.stat().st_size for file in Path(out).rglob("*") if file.is_file())
        store.close()
    medians = {name: median(values) for name, values in found.items()}
    return {
        "bench": "checkpoint",
        "stall_ratio": medians["stall_s"] / medians["waited_s"],
        **medians,
        "rounds": found,
        "checkpoint_bytes": size,
        "machine": machine(),
    }


def _seconds(*calls: Callable[[], Any]) -> float:
    start = perf_counter()
    for call in calls:
        call()
    return perf_counter() - start
