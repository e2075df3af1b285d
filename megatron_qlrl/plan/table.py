"""Plans as Markdown tables, for a terminal and for a README alike."""

from collections.abc import Sequence
from textwrap import fill

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.plan.advise import Option
from megatron_qlrl.plan.hardware import ASSUMED, GIB, Hardware
from megatron_qlrl.plan.memory import Peak, stage_parameters
from megatron_qlrl.plan.phase import Cluster, PhasePlan

WIDTH = 118


def plan_table(plans: Sequence[PhasePlan], shape: ModelShape, cluster: Cluster) -> str:
    """A column for each phase; GiB of the fullest rank, seconds of a step."""
    num = sum(stage_parameters(shape, tp=1, pp=1, stage=0))
    total = f"{cluster.hardware.memory_bytes / GIB:.1f}"
    title = f"{cluster.gpus} x {cluster.hardware.name}, {num / 1e9:.2f} B parameters"
    table = Table(title, *(p.name for p in plans), box=box.MARKDOWN)
    _add(table, "layout tp x pp x cp x dp", [_layout(p) for p in plans])
    _add(table, "recompute; engine tp", [_modes(p) for p in plans])
    _add(table, "row tokens (responses at most)", [_row(p) for p in plans])
    _add_peaks(table, f"**update, GiB of {total}**", [p.update for p in plans])
    if any(p.rollout for p in plans):
        _add_peaks(table, f"**rollout, GiB of {total}**", [p.rollout for p in plans])
        _add(table, "engine's cache, tokens (must hold)", [_cache(p) for p in plans])
    _add_host(table, plans)
    if any(p.rollout for p in plans):
        _add_times(table, plans, cluster)
    return _text(table)


def options_table(name: str, options: Sequence[Option], cluster: Cluster) -> str:
    """The layouts of `fastest`."""
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


def assumptions_line(hardware: Hardware) -> str:
    """What the plan takes for granted."""
    found = hardware.assumptions()
    numbers = ", ".join(f"{name} {_short(found[name])}" for name in ASSUMED)
    return fill(f"Assumed, not measured: {numbers}", width=100)


def _add(table: Table, label: str, cells: Sequence[str]) -> None:
    table.add_row(label, *cells)


def _add_peaks(table: Table, label: str, peaks: Sequence[Peak | None]) -> None:
    """The total, its moment, and its parts."""
    _add(table, label, ["" if p is None else f"**{p.total / GIB:.1f}**" for p in peaks])
    _add(table, "at the moment of", ["" if p is None else p.moment for p in peaks])
    for part in dict.fromkeys(name for p in peaks if p for name in p.parts):
        sizes = [0.0 if p is None else p.parts.get(part, 0.0) for p in peaks]
        _add(table, f"- {part}", [f"{size / GIB:.1f}" for size in sizes])


def _add_host(table: Table, plans: Sequence[PhasePlan]) -> None:
    for part in dict.fromkeys(name for p in plans for name in p.host):
        sizes = [f"{p.host.get(part, 0.0) / GIB:.1f}" for p in plans]
        _add(table, f"{part} in a node's host memory, GiB", sizes)


def _add_times(table: Table, plans: Sequence[PhasePlan], cluster: Cluster) -> None:
    _add(table, "**step, s** for prompts + responses of", [_lengths(p) for p in plans])
    for part in dict.fromkeys(name for p in plans for name in p.seconds):
        _add(table, f"- {part}", [f"{p.seconds.get(part, 0.0):,.0f}" for p in plans])
    _add(table, "- together", [f"**{sum(p.seconds.values()):,.0f}**" for p in plans])
    ratios = [p.work.separate / p.work.forward for p in plans]
    _add(table, "forward pass, PFLOP", [f"{p.work.forward / 1e15:,.0f}" for p in plans])
    _add(table, "without sharing prompts", [f"{ratio:.1f} times" for ratio in ratios])
    hours = [p.gpu_hours(cluster.gpus) for p in plans]
    cells = [f"{p.steps} steps, {h:,.0f}" for p, h in zip(plans, hours, strict=True)]
    _add(table, "**GPU-hours**", cells)


def _layout(plan: PhasePlan) -> str:
    policy = plan.config.policy
    return f"{policy.tp} x {policy.pp} x {policy.cp} x {plan.dp}"


def _modes(plan: PhasePlan) -> str:
    return f"{plan.config.policy.recompute}; {plan.config.rollout.tp}"


def _row(plan: PhasePlan) -> str:
    return f"{plan.row.tokens:,} ({plan.row.responses:,})"


def _cache(plan: PhasePlan) -> str:
    return f"{plan.cache_tokens:,.0f} ({plan.longest:,})"


def _lengths(plan: PhasePlan) -> str:
    return f"{plan.lengths.prompt:,} + {plan.lengths.response:,}"


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
