"""Measures the weights' way from the trainer's ranks to those of an engine, beside a gather of each
tensor by itself and beside a copy in memory.

The engine's side is what one without packing does: each rank copies what it keeps of a tensor into
memory of its own. What vLLM's reload costs beside that is in `qlrl bench step` (sync).
"""

from collections.abc import Iterable
from typing import Any

import torch

from megatron_qlrl.bench.measure import Cost, compare, machine
from megatron_qlrl.bench.policy import random_policy
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.parallel.collectives import gather_objects
from megatron_qlrl.weights.stream import WeightStream


def bench_sync(
    shape: ModelShape, *, tp: int, pp: int, engine_tp: int, bucket_mib: int, rounds: int
) -> dict[str, Any]:
    """Returns, for the slowest rank, `speedup_over_per_tensor`, `share_of_memcpy` (the copy's
    seconds over the stream's) and `extra_buckets` (the extra memory, gloo's own buffers included;
    a bucket is as large as the largest tensor at least). Every rank returns the same."""
    with random_policy(shape, tp=tp, pp=pp) as policy:
        context = policy.context
        bucketed, single = (
            WeightStream(policy.model, shape=shape, context=context, bucket_bytes=num_bytes)
            for num_bytes in (bucket_mib * 2**20, 0)
        )
        place = context.rank % engine_tp
        engine = {
            name: torch.empty_like(_kept(name, tensor, engine_tp, place)) for name, tensor in single
        }
        kept = sum(tensor.nbytes for tensor in engine.values())
        largest = max(tensor.nbytes for _, tensor in single)
        source = {name: torch.ones_like(tensor) for name, tensor in engine.items()}

        def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for name, tensor in weights:
                engine[name].copy_(_kept(name, tensor, engine_tp, place))
                del tensor  # or it would stay until the next bucket is there

        def copy() -> None:
            for name, tensor in source.items():
                engine[name].copy_(tensor)

        sides = {
            "stream": lambda: load(bucketed.for_engine(engine_tp)),
            "per_tensor": lambda: load(single),
            "memcpy": copy,
        }
        costs = _slowest(gather_objects(compare(sides, rounds=rounds)))
    seconds = {name: cost.wall_s for name, cost in costs.items()}
    return {
        "bench": "sync",
        "tp": tp,
        "pp": pp,
        "engine_tp": engine_tp,
        "bytes_kept": kept,
        "bucket_bytes": bucket_mib * 2**20,
        "speedup_over_per_tensor": seconds["per_tensor"] / seconds["stream"],
        "share_of_memcpy": seconds["memcpy"] / seconds["stream"],
        "extra_buckets": costs["stream"].peak_bytes / max(bucket_mib * 2**20, largest),
        "seconds": seconds,
        "machine": machine(),
    }


def _kept(name: str, tensor: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    """The part of a Hugging Face tensor that one of `tp` ranks of an engine keeps."""
    if tp == 1 or tensor.dim() == 1 and "norm" in name:
        return tensor
    columns = name.endswith(("o_proj.weight", "down_proj.weight"))
    return tensor.chunk(tp, 1 if columns else 0)[rank]


def _slowest(ranks: list[dict[str, Cost]]) -> dict[str, Cost]:
    return {
        name: Cost(
            max(costs[name].cpu_s for costs in ranks),
            max(costs[name].wall_s for costs in ranks),
            max(costs[name].peak_bytes for costs in ranks),
        )
        for name in ranks[0]
    }
