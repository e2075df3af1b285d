"""Searches layouts, for the smallest change that makes a phase fit and for the fastest ones."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import floor
from typing import Any

from megatron_qlrl.config.checks import check_layout
from megatron_qlrl.config.schema import Config
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.plan.estimate import Lengths
from megatron_qlrl.plan.phase import ENGINE_PARTS, Cluster, PhasePlan, plan_phase

RECOMPUTE = ("none", "selective", "full")

Changes = Mapping[str, Mapping[str, Any]]
"""New values of settings, by section of the config."""

RELIEFS: tuple[Changes, ...] = (
    {},
    {"optimizer": {"offload": True}},
    {"policy": {"offload_activations": True}},
    {"optimizer": {"offload": True}, "policy": {"offload_activations": True}},
)
"""What may be moved to host memory if a layout does not fit otherwise, the cheapest first."""


@dataclass(frozen=True)
class Option:
    """A layout that fits: the settings that it changes, by dotted name, and its plan."""

    changes: Mapping[str, Any]
    plan: PhasePlan

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self.changes.items()) or "as configured"

    @property
    def seconds(self) -> float:
        return sum(self.plan.seconds.values())


def smallest_change(
    config: Config, shape: ModelShape, cluster: Cluster, lengths: Lengths | None,
) -> Option | None:  # fmt: skip
    """Returns the option that changes the fewest settings, and the fastest of these; None if
    nothing fits. The engine's memory share counts as half a change."""

    def size(option: Option) -> tuple[float, float]:
        mild = "rollout.gpu_memory_utilization" in option.changes
        return len(option.changes) - mild / 2, option.seconds

    return min(options(config, shape, cluster, lengths), key=size, default=None)


def fastest(
    config: Config, shape: ModelShape, cluster: Cluster, lengths: Lengths | None, *, count: int,
) -> list[Option]:  # fmt: skip
    """Returns the `count` options with the shortest estimated steps."""
    by_time = sorted(
        options(config, shape, cluster, lengths), key=lambda o: (o.seconds, len(o.changes))
    )
    return by_time[:count]


def options(
    config: Config, shape: ModelShape, cluster: Cluster, lengths: Lengths | None,
) -> Iterator[Option]:  # fmt: skip
    """Yields every layout of the GPUs that fits. If one does not fit as it is, things are moved to
    host memory and the engine's memory share is changed."""
    for settings in _layouts(config, shape, cluster):
        if settings["recompute"] != "full":
            settings["offload_activations"] = False
        changed = _changed(config, {"policy": settings})
        left = list(_reliefs(changed))
        for tp in _engine_sizes(config, cluster) if config.phases else [config.rollout.tp]:
            sized = _changed(changed, {"rollout": {"tp": tp}})
            try:
                check_layout(sized, shape, world_size=cluster.gpus)
            except ConfigError:
                continue
            for relief in list(left):
                plan = plan_phase(_changed(sized, relief), shape, cluster, lengths=lengths)
                if plan.update.total > cluster.hardware.memory_bytes:
                    left.remove(relief)  # another size of the engine would not help
                    continue
                if plan.problems:
                    plan = plan_phase(
                        _with_largest_share(plan, cluster), shape, cluster, lengths=lengths
                    )
                if not plan.problems:
                    yield Option(_difference(config, plan.config), plan)
                    break


def _reliefs(config: Config) -> Iterator[Changes]:
    """Yields the reliefs that this config allows and that change it."""
    for relief in RELIEFS:
        if "policy" in relief and config.policy.recompute != "full":
            continue
        if "optimizer" in relief and config.model.dtype == "float32":
            continue
        if not relief or _changed(config, relief) != config:
            yield relief


def _with_largest_share(plan: PhasePlan, cluster: Cluster) -> Config:
    """Returns the plan's config with the largest memory share of the engine, in steps of 5 %, that
    the policy's state leaves."""
    assert plan.rollout is not None
    parts = plan.rollout.parts
    state = sum(parts[name] for name in parts if name not in ENGINE_PARTS)
    share = max(floor(20 * (1 - state / cluster.hardware.memory_bytes)), 1) / 20
    return _changed(plan.config, {"rollout": {"gpu_memory_utilization": share}})


def _layouts(config: Config, shape: ModelShape, cluster: Cluster) -> Iterator[dict[str, Any]]:
    """Yields policy settings with tp and ep within a node and pp that divides the layers."""
    powers = [2**k for k in range(cluster.gpus.bit_length())]
    near = [p for p in powers if p <= cluster.hardware.gpus_per_node]
    shards = [False, True] if not config.policy.distributed_optimizer else [True]
    for tp, ep in product(near, near if shape.experts else [1]):
        for pp in (p for p in powers if shape.num_layers % p == 0):
            for cp in (p for p in powers if cluster.gpus % (tp * pp * p) == 0):
                for recompute, sharded in product(RECOMPUTE, shards):
                    yield {
                        "tp": tp, "pp": pp, "cp": cp, "ep": ep, "recompute": recompute,
                        "distributed_optimizer": sharded,
                    }  # fmt: skip


def _engine_sizes(config: Config, cluster: Cluster) -> list[int]:
    sizes = [2**k for k in range(4) if 2**k <= cluster.hardware.gpus_per_node]
    return sorted({config.rollout.tp, *sizes})


def _changed(config: Config, changes: Changes) -> Config:
    sections = {
        name: getattr(config, name).model_copy(update=dict(settings))
        for name, settings in changes.items()
    }
    return config.model_copy(update=sections)


def _difference(before: Config, after: Config) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for section in ("policy", "rollout", "optimizer"):
        old, new = dict(getattr(before, section)), dict(getattr(after, section))
        changes |= {f"{section}.{k}": value for k, value in new.items() if value != old[k]}
    return changes
