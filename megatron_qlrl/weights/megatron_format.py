"""A policy's weights and optimizer in Megatron's sharded format (torch_dist): taken, written, read.

    weights/common.pt       what every rank has alike: parameter groups, counters
    weights/*.distcp        tensors, each written by one of the ranks that hold it
    weights/.metadata       where each tensor lies
    weights/metadata.json   the name of the format

Any layout (tp, pp, cp, dp) reads what another one wrote.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from megatron_qlrl.platform.megatron_cpu import megatron_device

FILES = ("common.pt", "metadata.json", ".metadata")
"""What reading needs, beside the tensors' files."""


@dataclass(frozen=True)
class Snapshot:
    """This rank's share of a checkpoint, in host memory: training may go on while it is written.

    Attributes:
        tensors: torch's sharded state dict; of a tensor that several ranks hold, one has it.
        common: what all ranks have alike.
        num_bytes: of this rank's tensors.
    """

    tensors: Mapping[str, Any]
    common: Mapping[str, Any]
    num_bytes: int

    def write_tensors(self, weights: Path, group: dist.ProcessGroup) -> None:
        """Collective over `group`. Written by torch's saver in this process, not by Megatron's:
        that starts three processes for each rank.

        Raises:
            CheckpointException: on every rank, whichever failed.
        """
        save_tensors(
            dict(self.tensors),
            # Not ahead: that would take CUDA's current stream, in this thread the first GPU's.
            storage_writer=FileSystemWriter(weights, per_thread_copy_ahead=0),
            planner=MCoreSavePlanner(flatten_state_dict=False),
            process_group=group,
        )

    def write_common(self, weights: Path) -> None:
        """What rank 0 writes. Megatron does so between collectives, where an error (a full disk)
        is rank 0's alone and leaves the others waiting."""
        torch.save(self.common, weights / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(weights))


def take_snapshot(model: Any, optimizer: Any) -> Snapshot:
    """Copies model and optimizer state into host memory; collective."""
    with megatron_device():
        _complete_adam_state(optimizer)
        tensors, common = save_preprocess(_sharded_state(model, optimizer, is_loading=False))
    assert isinstance(tensors, dict)
    by_key, *_ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    gathered = isinstance(_only_part(optimizer), DistributedOptimizer)
    num_bytes = 0
    for part in (part for parts in by_key.values() for part in parts):
        if isinstance(part, ShardedTensor):
            assert part.data is not None
            is_copy = gathered and part.key.startswith("optimizer.state.")
            part.data = part.data.detach().to("cpu", copy=not is_copy)
            num_bytes += part.data.nbytes
    # Objects (Transformer Engine's extra state) become bytes here.
    return Snapshot(mcore_to_pyt_state_dict(by_key), copy.deepcopy(common), num_bytes)


def read_all(weights: Path, *, model: Any, optimizer: Any) -> None:
    """Fills model and optimizer in place; collective.

    Raises:
        CheckpointException: it does not fit the model; on every rank, whichever failed.
    """
    with megatron_device():
        _complete_adam_state(optimizer)
        loaded = _read(_sharded_state(model, optimizer, is_loading=True), weights)
        model.load_state_dict(loaded["model"])
        _load_optimizer(optimizer, loaded["optimizer"])


def read_model(weights: Path, *, model: Any) -> None:
    """Fills the model alone; as `read_all`."""
    with megatron_device():
        sharded = {"model": model.sharded_state_dict(metadata=_metadata())}
        model.load_state_dict(_read(sharded, weights)["model"])


def _read(sharded: dict[str, Any], weights: Path) -> dict[str, Any]:
    loaded = dist_checkpointing.load(sharded, str(weights))
    assert isinstance(loaded, dict)
    return loaded


def _metadata() -> dict[str, Any]:
    """How Megatron lays out the optimizer state: by model parameter, so that any layout can
    read it. The distributed optimizer's is gathered for that in the host memory of data parallel
    rank 0 (mem_efficient), not on every rank and through the GPUs, where it would need room for
    all gradients once more. A new dict each time: Megatron keeps its process group in the one it
    is given."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _sharded_state(model: Any, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    weights = model.sharded_state_dict(metadata=metadata)
    moments = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return {"model": weights, "optimizer": moments}


def _complete_adam_state(optimizer: Any) -> None:
    """Gives each parameter both moments and, in torch's Adam, a `step` of its own.

    Megatron 0.16 does not expect an Adam that has no state yet: its distributed optimizer reads
    it while it prepares to save, and torch's `step` while it prepares to load, and neither
    optimizer keeps a state that no update has filled. And its distributed optimizer loads ONE
    step tensor into all parameters of torch's Adam (used where Transformer Engine, which keeps
    one for a group, is missing); torch adds 1 to it once for each of them.
    """
    part = _only_part(optimizer)
    part.init_state_fn(part.optimizer, part.config)
    if isinstance(part.optimizer, torch.optim.Adam):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone() if "step" in state else torch.tensor(0.0)


def _load_optimizer(optimizer: Any, loaded: dict[str, Any]) -> None:
    """`load_state_dict`, with the distributed optimizer's moments apart: Megatron 0.16 looks in
    them for all that a parameter's state has, and torch's Adam has a `step`, kept elsewhere."""
    part = _only_part(optimizer)
    moments = loaded.pop("param_state", None)
    inner = loaded.get("optimizer", loaded)
    if isinstance(part.optimizer, torch.optim.Adam) and "state" in inner:
        inner["state"].setdefault("common_step", torch.tensor(0.0))  # Megatron saves no 0
    part.load_state_dict(loaded)
    if moments is not None:
        states = part.optimizer.state
        steps = {p: state.pop("step") for p, state in states.items() if "step" in state}
        part.load_parameter_state_from_fully_reshardable(moments)
        for parameter, step in steps.items():
            states[parameter]["step"] = step
    _complete_adam_state(optimizer)


def _only_part(optimizer: Any) -> Any:
    """Megatron chains one optimizer for each kind of parameter; a dense model has one kind."""
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return part
