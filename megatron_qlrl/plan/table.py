"""Writes plans as Markdown tables, for a terminal or a README."""

from collections.abc import Callable, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.plan.advise import Option
from megatron_qlrl.plan.hardware import GIB, Hardware
from megatron_qlrl.plan.memory import Peak, active_parameters, stage_parameters
from megatron_qlrl.plan.phase import Cluster, PhasePlan

if TYPE_CHECKING:
    from megatron_qlrl.plan.lengths import Generation, Simulation

WIDTH = 118


def plan_table(plans: Sequence[PhasePlan], shape: ModelShape, cluster: Cluster) -> str:
    """Returns a table with a column for each phase: GiB of the fullest rank, seconds of a step."""
    num = sum(stage_parameters(shape, tp=1, pp=1, stage=0))
    total = f"{cluster.hardware.memory_bytes / GIB:.1f}"
    title = f"{cluster.gpus} x {cluster.hardware.name}, {num / 1e9:.2f} B parameters"
    if shape.experts:
        title += f", {active_parameters(shape) / 1e9:.2f} B active"
    table = Table(title, *(p.name for p in plans), box=box.MARKDOWN)

    def row(label: str, cell: Callable[[PhasePlan], str]) -> None:
        table.add_row(label, *map(cell, plans))

    row("layout tp x pp x cp x dp", _layout)
    if shape.experts:
        row("experts divided over (ep)", lambda p: str(p.config.policy.ep))
    row("recompute; engine tp", lambda p: f"{p.config.policy.recompute}; {p.config.rollout.tp}")
    row("row tokens (responses at most)", lambda p: f"{p.row.tokens:,} ({p.row.responses:,})")
    _add_peaks(table, f"**update, GiB of {total}**", [p.update for p in plans])
    generates = any(p.rollout for p in plans)
    if generates:
        _add_peaks(table, f"**rollout, GiB of {total}**", [p.rollout for p in plans])
        row(
            "engine's cache, tokens (must hold)", lambda p: f"{p.cache_tokens:,.0f} ({p.longest:,})"
        )
    for part in dict.fromkeys(name for p in plans for name in p.host):
        row(
            f"{part} in a node's host memory, GiB",
            lambda p, part=part: f"{p.host.get(part, 0.0) / GIB:.1f}",
        )
    if generates:
        row(
            "**step, s** for prompts + responses of",
            lambda p: f"{p.lengths.prompt:,} + {p.lengths.response:,}",
        )
        for part in dict.fromkeys(name for p in plans for name in p.seconds):
            row(f"- {part}", lambda p, part=part: f"{p.seconds.get(part, 0.0):,.0f}")
        row("- together", lambda p: f"**{sum(p.seconds.values()):,.0f}**")
        row("forward pass, PFLOP", lambda p: f"{p.work.forward / 1e15:,.0f}")
        row("without sharing prompts", lambda p: f"{p.work.separate / p.work.forward:.1f} times")
        row("**GPU-hours**", lambda p: f"{p.steps} steps, {p.gpu_hours(cluster.gpus):,.0f}")
    return _text(table)


def options_table(name: str, options: Sequence[Option], cluster: Cluster) -> str:
    """Returns a table of the layouts that `fastest` found."""
    table = Table(
        f"{name}: fastest layouts", "step, s", "update, GiB", "rollout, GiB", box=box.MARKDOWN
    )
    for option in options:
        plan = option.plan
        rollout = "" if plan.rollout is None else f"{plan.rollout.total / GIB:.1f}"
        table.add_row(
            str(option), f"{option.seconds:,.0f}", f"{plan.update.total / GIB:.1f}", rollout
        )
    if not options:
        table.add_row(f"none fits {cluster.gpus} x {cluster.hardware.name}", "", "", "")
    return _text(table)


def lengths_table(name: str, simulation: "Simulation") -> str:
    """Returns a table of a phase's generation with responses of different lengths."""
    sides = simulation.sides
    table = Table(f"{name}: generation", *sides, box=box.MARKDOWN)

    def row(label: str, cell: Callable[["Generation"], str]) -> None:
        table.add_row(label, *map(cell, sides.values()))

    row("seconds of a step", lambda g: f"**{g.seconds:,.0f}**")
    row("- of them to read prompts and begun responses", lambda g: f"{g.read_s:,.0f}")
    row(
        f"- more than if all had the mean length ({simulation.at_mean_s:,.0f})",
        lambda g: f"{g.seconds - simulation.at_mean_s:,.0f}",
    )
    row("tokens per second", lambda g: f"{g.tokens / g.seconds:,.0f}")
    row("rounds of a step", lambda g: f"{g.rounds:.1f}")
    row("slots idle", lambda g: f"{g.slots_idle:.0%}")
    row("engines idle", lambda g: f"{g.engines_idle:.0%}")
    row("trained tokens from older weights", lambda g: f"{g.stale_share:.0%}")
    return _text(table) + fill(
        f"Simulated: {simulation.engines} engines, each with {simulation.responses:,.0f} responses "
        f"and room for {simulation.slots} at one time; partial with rollout.tokens_per_round="
        f"{simulation.tokens_per_round} algorithm.max_staleness={simulation.max_staleness}",
        width=100,
    )


def assumptions_line(hardware: Hardware) -> str:
    """Returns the plan's assumptions as text."""
    numbers = ", ".join(f"{name} {_short(value)}" for name, value in hardware.assumptions().items())
    return fill(f"Assumed, not measured: {numbers}", width=100)


def _add_peaks(table: Table, label: str, peaks: Sequence[Peak | None]) -> None:
    """Adds rows with the total, its moment, and its parts."""
    table.add_row(label, *("" if p is None else f"**{p.total / GIB:.1f}**" for p in peaks))
    table.add_row("at the moment of", *("" if p is None else p.moment for p in peaks))
    for part in dict.fromkeys(name for p in peaks if p for name in p.parts):
        sizes = [0.0 if p is None else p.parts.get(part, 0.0) for p in peaks]
        table.add_row(f"- {part}", *(f"{size / GIB:.1f}" for size in sizes))


def _layout(plan: PhasePlan) -> str:
    policy = plan.config.policy
    return f"{policy.tp} x {policy.pp} x {policy.cp} x {plan.dp}"


def _short(value: float) -> str:
    if value >= GIB and value % GIB == 0:
        return f"{value / GIB:g} GiB"
    return f"{value / 1e9:g} GB/s" if value >= 1e9 else f"{value:g}"


def _text(table: Table) -> str:
    console = Console(width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join(line for line in lines if line) + "\n"
