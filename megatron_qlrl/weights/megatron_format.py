"""Takes, writes and reads a policy's weights and optimizer in Megatron's sharded format.

    weights/common.pt       what is the same on every rank: parameter groups, counters
    weights/*.distcp        tensors, each written by one of the ranks that hold it
    weights/.metadata       where each tensor lies
    weights/metadata.json   the name of the format

Any layout (tp, pp, cp, dp) reads what another one wrote.
"""

import copy
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import (
    StrictHandling,
    determine_global_metadata,
    validate_integrity_and_strict_load,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load_state_dict as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.parallel.collectives import on_all_ranks
from megatron_qlrl.platform.env import PICKLED_STATE, may_unpickle_state
from megatron_qlrl.platform.megatron_cpu import megatron_device
from megatron_qlrl.weights.moments import sharded_by_parameter
from megatron_qlrl.weights.stored import BACKEND, DAMAGED, EXTRA_STATE, StoredWeights, refused


@dataclass(frozen=True)
class Snapshot:
    """This rank's share of a checkpoint, in host memory, so that training goes on meanwhile.

    Attributes:
        tensors: torch's sharded state dict; one rank has a tensor that several ranks hold.
        common: what is the same on all ranks.
        num_bytes: size of this rank's tensors.
    """

    tensors: Mapping[str, Any]
    common: Mapping[str, Any]
    num_bytes: int

    def write_tensors(self, weights: Path, group: dist.ProcessGroup) -> None:
        """Writes this rank's tensors; collective over `group`. torch's saver does it in this
        process: Megatron's would start three processes for each rank.

        Raises:
            CheckpointException: a rank could not write (every rank).
        """
        save_tensors(
            dict(self.tensors),
            # Not ahead: that would take CUDA's current stream, in this thread the first GPU's.
            storage_writer=FileSystemWriter(weights, per_thread_copy_ahead=0),
            planner=MCoreSavePlanner(flatten_state_dict=False),
            process_group=group,
        )

    def write_common(self, weights: Path) -> None:
        """Writes rank 0's part. Megatron would do so between collectives, where an error (a full
        disk) is rank 0's alone and leaves the others waiting."""
        torch.save(self.common, weights / "common.pt")
        (weights / "metadata.json").write_text(json.dumps(BACKEND))


def take_snapshot(model: Any, optimizer: Any) -> Snapshot:
    """Copies model and optimizer state into host memory; collective."""
    with megatron_device():
        _complete_adam_state(optimizer)
        tensors, common = save_preprocess(_sharded_state(model, optimizer, is_loading=False))
    assert isinstance(tensors, dict)
    by_key, *_ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    gathered = any(isinstance(part, DistributedOptimizer) for part in _parts(optimizer))
    num_bytes = 0
    for part in (part for parts in by_key.values() for part in parts):
        if isinstance(part, ShardedTensor):
            assert part.data is not None
            is_copy = gathered and part.key.startswith("optimizer.state.")
            part.data = part.data.detach().to("cpu", copy=not is_copy)
            num_bytes += part.data.nbytes
    # Objects (Transformer Engine's extra state) become bytes here.
    return Snapshot(mcore_to_pyt_state_dict(by_key), copy.deepcopy(common), num_bytes)


def read_all(stored: StoredWeights, *, model: Any, optimizer: Any) -> None:
    """Fills model and optimizer in place; collective.

    Raises:
        CheckpointException: it does not fit the model (every rank).
        CheckpointError: it holds FP8 state that may not be unpickled (every rank).
    """
    with megatron_device():
        _complete_adam_state(optimizer)
        loaded = _read(_sharded_state(model, optimizer, is_loading=True), stored)
        _load_model(model, loaded["model"])
        _load_optimizer(optimizer, loaded["optimizer"])


def read_model(stored: StoredWeights, *, model: Any) -> None:
    """Fills the model alone; raises as `read_all`."""
    with megatron_device():
        sharded = {"model": model.sharded_state_dict(metadata=_metadata())}
        _load_model(model, _read(sharded, stored)["model"])


def _read(sharded: dict[str, Any], stored: StoredWeights) -> dict[str, Any]:
    """Does what Megatron's own load does, from steps that all supported versions have. That load
    unpickles in two places, and what it accepts differs by version."""
    sharded, local, factories = load_preprocess(sharded)
    assert isinstance(factories, dict)
    loaded = copy.deepcopy(stored.common)
    merge(loaded, local)
    sharded, _ = extract_sharded_base(sharded)
    mine, everyone = determine_global_metadata(sharded)
    validate_integrity_and_strict_load(
        sharded, StrictHandling.ASSUME_OK_UNEXPECTED, True, mine, everyone
    )
    merge(loaded, _read_tensors(sharded, stored))
    apply_factory_merges(loaded, factories)
    return loaded


def _read_tensors(sharded: dict[str, Any], stored: StoredWeights) -> dict[str, Any]:
    """Reads the tensors that `sharded` describes, with a reader and a planner that unpickle
    nothing."""
    tensors = [t for t in nested_values(sharded) if isinstance(t, ShardedTensor)]
    by_key, flat_names, renamed = _replace_state_dict_keys_with_sharded_keys(sharded)
    targets = mcore_to_pyt_state_dict(by_key, is_loading=True)
    load_tensors(
        targets,
        _Reader(stored.folder, stored.metadata),
        planner=_Planner(
            stored.folder,
            shapes_validation_sharded_tensors=[t for t in tensors if not t.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={
                t.key: t for t in tensors if t.allow_shape_mismatch
            },
        ),
    )
    filled: dict[str, Any] = {
        key: _unwrap_pyt_sharded_tensor(target) for key, target in targets.items()
    }
    loaded = _replace_sharded_keys_with_state_dict_keys(filled, flat_names, renamed)
    _restore_dict_types(loaded, sharded)
    return loaded


def _load_model(model: Any, loaded: dict[str, Any]) -> None:
    """Calls `load_state_dict` with as little of the layers' extra state as the model needs.

    Transformer Engine unpickles that state. Only delayed FP8 scaling needs it; other recipes keep
    none (before Transformer Engine 2.20 they saved it all the same).
    """
    extra = sorted(
        name
        for name, value in loaded.items()
        if name.endswith(EXTRA_STATE)
        and not (value is None or (isinstance(value, torch.Tensor) and not value.numel()))
    )
    if model.config.fp8 and model.config.fp8_recipe == "delayed":
        on_all_ranks(partial(_check_may_unpickle, extra))
    else:
        loaded |= {name: torch.empty(0, dtype=torch.uint8) for name in extra}
    model.load_state_dict(loaded)


def _check_may_unpickle(names: Sequence[str]) -> None:
    if names and not may_unpickle_state():
        raise CheckpointError(
            f"the checkpoint holds Transformer Engine's state of delayed FP8 scaling ({names[0]}), "
            "a pickle, and reading that could run any code. If the checkpoint is your own, set "
            f"{PICKLED_STATE}=1 in the environment; else set another policy.fp8_recipe, which "
            "leaves that state aside"
        )


class _Reader(FileSystemReader):
    """Reads tensors where the metadata, which is read already, says that they lie. (It has no
    `**kwargs`, from which torch would conclude that a rank may have metadata of its own.)"""

    def __init__(self, folder: Any, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._metadata


class _Planner(MCoreLoadPlanner):
    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self._folder = folder

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Reads one object; torch's planner would unpickle any. Our checkpoints hold only the
        layers' extra state: a list of one tensor, or of None where a layer keeps nothing."""
        name = read_item.dest_index.fqn
        foreign = refused(self._folder, f"what it holds as {name} is no tensor")
        try:
            (content,) = torch.load(value, map_location="cpu", weights_only=True)
        except (*DAMAGED, RuntimeError) as error:
            raise foreign from error
        if not isinstance(content, torch.Tensor | None):
            raise foreign
        set_element(self.original_state_dict, self.mappings[name], [content])


def _metadata() -> dict[str, Any]:
    """Returns how Megatron lays out the optimizer state: by model parameter, so that any layout
    can read it (the distributed optimizer's: `moments.py`). The dict is new each time, because
    Megatron keeps a process group in it."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _sharded_state(model: Any, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    weights = model.sharded_state_dict(metadata=metadata)
    with patch.object(
        DistributedOptimizer, "sharded_param_state_fully_reshardable", sharded_by_parameter
    ):
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
    for part in _parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam):
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone() if "step" in state else torch.tensor(0.0)


def _load_optimizer(optimizer: Any, loaded: dict[Any, Any]) -> None:
    parts = _parts(optimizer)
    each = [loaded] if len(parts) == 1 else [loaded[number] for number in range(len(parts))]
    for part, state in zip(parts, each, strict=True):
        _load_part(part, state)
    _complete_adam_state(optimizer)


def _load_part(part: Any, loaded: dict[str, Any]) -> None:
    """Calls `load_state_dict`, and loads the distributed optimizer's moments apart: Megatron 0.16
    looks in them for all of a parameter's state, and the `step` of torch's Adam is elsewhere."""
    moments = loaded.pop("param_state", None)
    inner = loaded.get("optimizer", loaded)
    if isinstance(part.optimizer, torch.optim.Adam) and "state" in inner:
        inner["state"].setdefault("common_step", torch.tensor(0.0))  # Megatron saves no 0
    _know_groups(inner["param_groups"], part.param_groups)
    part.load_state_dict(loaded)
    if moments is not None:
        states = part.optimizer.state
        steps = {p: state.pop("step") for p, state in states.items() if "step" in state}
        part.load_parameter_state_from_fully_reshardable(moments)
        for parameter, step in steps.items():
            states[parameter]["step"] = step


def _know_groups(saved: list[dict[str, Any]], present: list[dict[str, Any]]) -> None:
    """Gives saved parameter groups the present values of the settings that Megatron knows a group
    by. Those differ by version, and from 0.17 on the configured learning rate is one of them, which
    a run may change when it resumes. Ours differ only in the weight decay: none for vectors."""
    for group in saved:
        (same,) = (other for other in present if other["wd_mult"] == group["wd_mult"])
        group |= {key: same[key] for key in param_group_identifier_keys if key in same}


def _parts(optimizer: Any) -> list[Any]:
    """Megatron chains one optimizer for each kind of parameter: a model with experts has two, that
    of the experts last, and a dense model has one."""
    return getattr(optimizer, "chained_optimizers", [optimizer])
