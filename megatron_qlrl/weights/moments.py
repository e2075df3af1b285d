"""The distributed optimizer's state in the shape of the model's parameters.

Each data parallel rank keeps one cut of a long buffer in which parameters lie end to end. In a
checkpoint the float32 weight and both moments of a parameter have the parameter's shape, so that
any layout can read them. Megatron would gather all of them in the host memory of data parallel
rank 0, and read all of them on every rank. Here the ranks share the parameters: the rank with the
largest part of one gathers it, and for a load each rank reads those of which it keeps a part. So a
rank's host memory holds its own share, and the parameters at its seams whole.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

NAMES = ("param", "exp_avg", "exp_avg_sq")

Cut = tuple[int, int]
"""First and last + 1 element of the part of a flattened parameter that a rank keeps."""


def sharded_by_parameter(
    optimizer: Any, weights: dict[str, Any], is_loading: bool, _: Any
) -> dict[int, dict[str, Any]]:
    """Returns what this rank writes, or reads, of a distributed optimizer's state, by the number of
    the parameter. It stands for `DistributedOptimizer.sharded_param_state_fully_reshardable`;
    collective.

    Args:
        weights: the model's sharded state dict.
    """
    of_parameter = {
        sharded.data: sharded
        for sharded in nested_values(extract_sharded_tensors_and_factories(weights)[0])
    }
    group = optimizer.data_parallel_group_gloo
    result: dict[int, dict[str, Any]] = {}
    number = 0
    for buffer in optimizer.buffers:
        for parameter, (start, end, bucket) in buffer.param_index_map.items():
            cuts = cuts_of(buffer.buckets[bucket], start, end, num_ranks=group.size())
            owner = max(cuts, key=lambda rank: cuts[rank][1] - cuts[rank][0])
            wanted = group.rank() in cuts if is_loading else group.rank() == owner
            whole = {name: torch.empty(end - start) for name in NAMES} if wanted else {}
            if not is_loading and group.rank() in cuts:
                state = optimizer._get_main_param_and_optimizer_states(parameter)
                for name in NAMES:
                    _gather(whole.get(name), state[name], cuts, owner, group)
            if wanted:
                weight = of_parameter[parameter]
                result[number] = {
                    name: _like(weight, name, tensor, is_main=group.rank() == owner)
                    for name, tensor in whole.items()
                }
            number += 1
    return result


def cuts_of(bucket: Any, start: int, end: int, *, num_ranks: int) -> dict[int, Cut]:
    """Returns each rank's cut of the parameter at [start, end) of the buffer; ranks without one are
    left out. A bucket is cut into equal parts."""
    share = bucket.grad_data.numel() // num_ranks
    cuts = {}
    for rank in range(num_ranks):
        first = max(bucket.offset + rank * share, start) - start
        last = min(bucket.offset + (rank + 1) * share, end) - start
        if first < last:
            cuts[rank] = first, last
    return cuts


def _gather(
    whole: torch.Tensor | None, part: torch.Tensor, cuts: dict[int, Cut], owner: int, group: Any
) -> None:
    """Fills `whole` on the owner; called by every rank that has a part."""
    ranks = dist.get_process_group_ranks(group)
    part = part.detach().flatten().cpu()
    if whole is None:
        dist.send(part, ranks[owner], group=group)
        return
    for rank, (first, last) in cuts.items():
        if rank == owner:
            whole[first:last] = part
        else:
            dist.recv(whole[first:last], ranks[rank], group=group)


def _like(weight: Any, name: str, tensor: torch.Tensor, *, is_main: bool) -> Any:
    """Returns `tensor` described as the model's `weight` is; one rank has the main copy."""
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{name}.{weight.key}",
        "data": tensor.view(weight.data.shape),
        "replica_id": (*weight.replica_id[:-1], 0 if is_main else 1),
    }
    if not isinstance(weight, ShardedTensorFactory):
        changes["dtype"] = tensor.dtype
    return replace(weight, **changes)
