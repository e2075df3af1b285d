"""`qlrl plan`: estimates memory and time, and says what does not fit, before anything starts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_qlrl.cli.train import ConfigPath, Overrides
from megatron_qlrl.config import checks
from megatron_qlrl.config.load import load_config
from megatron_qlrl.config.schema import Config
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.plan.advise import Option, fastest, smallest_change
from megatron_qlrl.plan.estimate import Lengths
from megatron_qlrl.plan.hardware import find_hardware
from megatron_qlrl.plan.memory import Peak
from megatron_qlrl.plan.phase import Cluster, PhasePlan, plan_phase
from megatron_qlrl.plan.shapes import find_shape
from megatron_qlrl.plan.table import assumptions_line, lengths_table, options_table, plan_table

if TYPE_CHECKING:
    from megatron_qlrl.plan.lengths import Simulation

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
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="LOG|lognormal[:MEDIAN,SIGMA]",
            help="Response lengths as a distribution: a run folder, one of its rollout logs, or "
            "log-normal (2000,1 by default). Simulates stragglers and partial rollouts.",
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
    for phase in phases:
        checks.check_layout(phase, shape, world_size=cluster.gpus)
    mean = None if mean_tokens is None else Lengths(*mean_tokens)
    if lengths is None:
        plans = [plan_phase(phase, shape, cluster, lengths=mean) for phase in phases]
        simulated = {}
    else:
        plans, simulated = _simulate(lengths, phases, shape, cluster, mean)
    best = {
        p.name: fastest(p.config, shape, cluster, p.lengths, count=NUM_OPTIONS)
        for p in (plans if advise else [])
    }
    if as_json:
        typer.echo(json.dumps(_as_json(plans, cluster, source, simulated, best), indent=1))
    else:
        typer.echo(plan_table(plans, shape, cluster))
        for name, simulation in simulated.items():
            typer.echo(lengths_table(name, simulation) + "\n")
        for name, options in best.items():
            typer.echo(options_table(name, options, cluster))
        typer.echo(f"The model's shape: {source}")
        typer.echo(assumptions_line(cluster.hardware))
    for p in plans:
        if p.problems:
            raise ConfigError(_advice(p, shape, cluster))


def _simulate(
    spec: str, phases: Sequence[Config], shape: ModelShape, cluster: Cluster, mean: Lengths | None
) -> tuple[list[PhasePlan], dict[str, "Simulation"]]:
    """Returns the plans with responses of a distribution, and each phase's generation."""
    from megatron_qlrl.plan.lengths import mean_tokens, read_lengths, simulate_phase, with_lengths

    draw = read_lengths(spec)
    plans: list[PhasePlan] = []
    simulated: dict[str, Simulation] = {}
    for phase in phases:
        if not phase.phases:
            raise ConfigError("--lengths is for the phases of RL, and this config has none")
        response = mean_tokens(draw, phase.rollout.max_response_tokens)
        lengths = Lengths(mean.prompt if mean else phase.max_input_tokens, response)
        p = plan_phase(phase, shape, cluster, lengths=lengths)
        simulated[p.name] = simulate_phase(p, draw, gpus=cluster.gpus)
        plans.append(with_lengths(p, simulated[p.name]))
    return plans, simulated


def _advice(plan: PhasePlan, shape: ModelShape, cluster: Cluster) -> str:
    """Returns the first thing that does not fit, and the smallest change that makes all fit."""
    start = f"phase {plan.name} does not fit on {cluster.gpus} x {cluster.hardware.name}: "
    option = smallest_change(plan.config, shape, cluster, plan.lengths)
    if option is None:
        return start + (
            f"{plan.problems[0]}; no layout of these GPUs fits: use more of them, or shorten "
            "policy.max_tokens_per_row"
        )
    return start + f"{plan.problems[0]}; the smallest change that fits: {option}"


def _peak(peak: Peak) -> dict[str, Any]:
    return {"moment": peak.moment, "total": peak.total} | dict(peak.parts)


def _as_json(
    plans: list[PhasePlan],
    cluster: Cluster,
    source: str,
    simulated: Mapping[str, "Simulation"],
    best: Mapping[str, list[Option]],
) -> dict[str, Any]:
    return {
        "gpus": cluster.gpus,
        "shape_from": source,
        "hardware": asdict(cluster.hardware),
        "assumptions": sorted(cluster.hardware.assumptions()),
        "phases": [
            {
                "name": p.name,
                "layout": {
                    k: getattr(p.config.policy, k) for k in ("tp", "pp", "cp", "ep", "recompute")
                }
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
                "generation": asdict(simulated[p.name]) if p.name in simulated else None,
                "gpu_hours": p.gpu_hours(cluster.gpus),
                "problems": list(p.problems),
                "advice": [
                    {"changes": dict(o.changes), "seconds": o.seconds} for o in best.get(p.name, [])
                ],
            }
            for p in plans
        ],
    }
