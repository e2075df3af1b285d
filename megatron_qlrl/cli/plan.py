"""`qlrl plan`: estimates memory and time, and says what does not fit, before anything starts."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from megatron_qlrl.cli.train import ConfigPath, Overrides
from megatron_qlrl.config import checks
from megatron_qlrl.config.load import load_config
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.plan.advise import Option, fastest, smallest_change
from megatron_qlrl.plan.estimate import Lengths
from megatron_qlrl.plan.hardware import find_hardware
from megatron_qlrl.plan.memory import Peak
from megatron_qlrl.plan.phase import Cluster, PhasePlan, plan_phase
from megatron_qlrl.plan.shapes import find_shape
from megatron_qlrl.plan.table import assumptions_line, options_table, plan_table

NUM_OPTIONS = 5
"""Layouts that --advise shows."""


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Default: the fewest that hold the layout.")
    ] = None,
    hardware: Annotated[str, typer.Option(help="h100-80g or h200-141g.")] = "h100-80g",
    mean_tokens: Annotated[
        tuple[int, int] | None,
        typer.Option(
            help="Mean tokens of prompts and of responses for the time estimate. Default: the "
            "longest of each phase, the costliest step there is."
        ),
    ] = None,
    advise: Annotated[bool, typer.Option("--advise", help="Also the fastest layouts.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Estimate each rank's memory by part, and the step time and GPU-hours of every phase. Needs no
    GPU and no more of the model than its config.json. Exit code 2 when something does not fit."""
    loaded = load_config(config, overrides or [])
    phases = loaded.phase_configs()
    shape, source = find_shape(loaded.model)
    cluster = Cluster(gpus or checks.smallest_world_size(phases), find_hardware(hardware))
    lengths = None if mean_tokens is None else Lengths(*mean_tokens)
    for phase in phases:
        checks.check_layout(phase, shape, world_size=cluster.gpus)
    plans = [plan_phase(phase, shape, cluster, lengths=lengths) for phase in phases]
    best = {
        p.name: fastest(p.config, shape, cluster, lengths, count=NUM_OPTIONS)
        for p in (plans if advise else [])
    }
    if as_json:
        typer.echo(json.dumps(_as_json(plans, cluster, source, best), indent=1))
    else:
        typer.echo(plan_table(plans, shape, cluster))
        for name, options in best.items():
            typer.echo(options_table(name, options, cluster))
        typer.echo(f"The model's shape: {source}")
        typer.echo(assumptions_line(cluster.hardware))
    for p in plans:
        if p.problems:
            raise ConfigError(_advice(p, shape, cluster, lengths))


def _advice(plan: PhasePlan, shape: ModelShape, cluster: Cluster, lengths: Lengths | None) -> str:
    """Returns the first thing that does not fit, and the smallest change that makes all fit."""
    start = f"phase {plan.name} does not fit on {cluster.gpus} x {cluster.hardware.name}: "
    option = smallest_change(plan.config, shape, cluster, lengths)
    if option is None:
        return start + (
            f"{plan.problems[0]}; no layout of these GPUs fits: use more of them, or shorten "
            "policy.max_tokens_per_row"
        )
    return start + f"{plan.problems[0]}; the smallest change that fits: {option}"


def _peak(peak: Peak) -> dict[str, Any]:
    return {"moment": peak.moment, "total": peak.total} | dict(peak.parts)


def _as_json(
    plans: list[PhasePlan], cluster: Cluster, source: str, best: dict[str, list[Option]]
) -> dict[str, Any]:
    return {
        "gpus": cluster.gpus,
        "shape_from": source,
        "hardware": asdict(cluster.hardware),
        "assumptions": sorted(cluster.hardware.assumptions()),
        "phases": [
            {
                "name": p.name,
                "layout": {k: getattr(p.config.policy, k) for k in ("tp", "pp", "cp", "recompute")}
                | {"dp": p.dp, "rollout_tp": p.config.rollout.tp},
                "row": asdict(p.row),
                "update_bytes": _peak(p.update),
                "rollout_bytes": p.rollout and _peak(p.rollout),
                "cache_tokens": p.cache_tokens,
                "longest_sequence": p.longest,
                "host_bytes": p.host,
                "flops": asdict(p.work),
                "mean_tokens": asdict(p.lengths),
                "seconds": dict(p.seconds),
                "gpu_hours": p.gpu_hours(cluster.gpus),
                "problems": list(p.problems),
                "advice": [
                    {"changes": dict(o.changes), "seconds": o.seconds} for o in best.get(p.name, [])
                ],
            }
            for p in plans
        ],
    }
