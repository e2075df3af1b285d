"""What the page shows of runs, as plain data for its script: sums, tables, curves, samples."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_qlrl import __version__
from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import DataError
from megatron_qlrl.evaluate import paper
from megatron_qlrl.evaluate.compare import Difference, RunScores, compare
from megatron_qlrl.evaluate.statistics import mean_error
from megatron_qlrl.metrics.monitor import RULES
from megatron_qlrl.report.cost import STAGES, run_cost
from megatron_qlrl.report.read import Evaluation, Run, flat, is_number
from megatron_qlrl.report.samples import choose_samples

MAX_POINTS, MAX_SAMPLE_BYTES = 6_000, 3_000_000
"""For all runs together."""
MAX_EVENTS, MAX_SETTING = 300, 500

CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Reward", ("critic/rewards/mean",)),
    ("Reward by source", (r"source/.+/critic/rewards/mean",)),
    ("Held-out score", (r"val/.+/score",)),
    ("SFT loss", ("sft/nll",)),
    ("Entropy (nats a token)", ("actor/entropy",)),
    ("KL from the reference (nats a token)", ("actor/kl_loss",)),
    ("Response length (tokens)", ("response_length/mean",)),
    ("Cut and unanswered responses (share)", (
        "response_length/clip_ratio", "reward/rule/no_answer",
    )),
    ("Behaviours by the judge (a response)", (r"behaviours/judge/.+",)),
    ("Behaviours by patterns (sentences of a response)", (r"behaviours/patterns/.+",)),
    ("Gradient norm", ("actor/grad_norm",)),
    ("Trainer against engine (probability)", ("training/rollout_probs_diff_mean",)),
    ("Clipped tokens (share)", ("actor/pg_clipfrac",)),
    ("Learning rate", ("actor/lr",)),
    ("Curriculum: rewards", (r"curriculum/(new|carried)/critic/rewards/mean",)),
    ("Curriculum: prompts", (r"curriculum/(new|carried)/(drawn|solved)",)),
    ("Prompt length (tokens)", ("prompt_length/mean",)),
    ("Seconds of a step", ("timing_s/step", *(f"timing_s/{stage}" for stage in STAGES))),
    ("Tokens a second and process", ("perf/throughput",)),
)  # fmt: skip
"""Title and metrics (patterns of whole names) of each chart."""

CURRICULUM = (
    "pool_prompts", "epoch", "seen_prompts", "seen_rewards/mean", "zero_reward_prompts",
    "new/drawn", "new/solved", "new/reached", "carried/drawn", "carried/solved", "carried/reached",
)  # fmt: skip


def contents(runs: Sequence[Run], *, rate: float | None, detail: float = 1.0) -> dict[str, Any]:
    """Returns everything the page shows.

    Args:
        rate: price of one process for one hour; None leaves money out.
        detail: share of the usual number of points in the curves, and of the room for samples.
    """
    points, room = (int(detail * limit / len(runs)) for limit in (MAX_POINTS, MAX_SAMPLE_BYTES))
    shown = [
        _run(run, rate, max_points=max(points, 20), max_bytes=room)
        | {"first_step": _first_step(run, runs)}
        for run in runs
    ]
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "rate": rate,
        "charts": _charts(shown),
        "evaluations": _evaluations(runs),
        "differences": _differences(runs),
        "published": _published(runs),
        "settings": _settings(runs),
        "runs": shown,
    }


def _run(run: Run, rate: float | None, *, max_points: int, max_bytes: int) -> dict[str, Any]:
    notes = list(run.notes)
    samples = choose_samples(run.folder / "rollouts", notes, max_bytes=max_bytes)
    curves = _curves(run.steps, "step", max_points, notes)
    tests = _curves(run.tests, "steps_done", max_points, notes)
    return {
        "label": run.label,
        "folder": str(run.folder),
        "status": _status(run),
        "command": run.command,
        "parent": f"{run.parent[0]}, step {run.parent[1]}" if run.parent else None,
        "steps_done": run.steps_done,
        "steps_planned": _planned(run),
        "judge": _judge(run),
        "cost": run_cost(run, rate),
        "phases": _phases(run),
        "curves": {"steps": curves, "tests": tests},
        "events": _events(run, notes),
        "starts": [{k: _plain(v) for k, v in start.items()} for start in run.starts],
        "samples": samples,
        "notes": notes,
    }


# --- summary -----------------------------------------------------------------------------


def _planned(run: Run) -> int | None:
    planned = run.config.total_rl_steps if run.config and run.command == "rl" else 0
    return planned or None


def _first_step(run: Run, runs: Sequence[Run]) -> int:
    """Returns where the curves of a run begin: behind those of the runs that it continues, as far
    as the page shows them."""
    if run.parent is None:
        return 0
    folder, step = run.parent
    others = [other for other in runs if other is not run]
    parent = next((other for other in others if other.folder == folder), None)
    return 0 if parent is None else step + _first_step(parent, others)


def _status(run: Run) -> str:
    planned = _planned(run)
    ended = (run.folder / "hf" / "config.json").is_file() and run.steps_done >= (planned or 0)
    if ended or run.command == "eval":
        return "finished"
    return "going on" if run.is_held else "stopped"


def _judge(run: Run) -> str | None:
    """Returns the judge with what its certificate says, or None for a run without a judge."""
    judge = run.config.reward.judge if run.config else None
    if judge is None:
        return None
    if run.certificate is None:
        return f"{judge.model}: no certificate"
    bound = judge.max_false_positive
    demanded = "" if bound is None else f"; demanded: false positives of at most {bound:.1%}"
    return f"{judge.model}: {run.certificate.summary()}{demanded}"


def _bounds(run: Run) -> list[tuple[Any, int, int]]:
    """Returns each phase with its first step and the one after its last."""
    phases = run.config.phases if run.config and run.command == "rl" else ()
    ends = np.cumsum([0, *(phase.steps for phase in phases)]).tolist()
    return [(phase, *bounds) for phase, bounds in zip(phases, pairwise(ends), strict=True)]


def _phases(run: Run) -> list[dict[str, Any]]:
    """Returns each phase's plan, and the newest counts of its curriculum."""
    shown = []
    for phase, start, end in _bounds(run):
        lines = [line for line in run.steps if start <= line["step"] < end]
        ends = [lines[0], lines[-1]] if lines else []
        last = lines[-1] if lines else {}
        shown.append(
            {
                "name": phase.name,
                "max_input_tokens": phase.max_input_tokens,
                "start": start,
                "steps": phase.steps,
                "steps_done": len(lines),
                "seconds": sum(line.get("timing_s/step", 0.0) for line in lines),
                "reward": [_short(line.get("critic/rewards/mean")) for line in ends],
                "curriculum": [_short(last.get(f"curriculum/{name}")) for name in CURRICULUM],
            }
        )
    return shown


# --- evaluations -------------------------------------------------------------------------


def _evaluations(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the table of scores: a row for each evaluation, a pair [mean, standard error] for
    each benchmark, None where there is none; and the other figures, a row for each benchmark."""
    everything = [(run, evaluation) for run in runs for evaluation in run.evaluations]
    names = list(dict.fromkeys(name for _, e in everything for name in e.means))
    rows = [
        {
            "run": run.label,
            "name": evaluation.name,
            "cells": [_score(evaluation, name) for name in names] + [_mean(evaluation, names)],
        }
        for run, evaluation in everything
    ]
    figures = dict.fromkeys(f for _, e in everything for own in e.figures.values() for f in own)
    more = [
        {
            "run": run.label,
            "name": evaluation.name,
            "benchmark": benchmark,
            "values": [_short(own.get(figure)) for figure in figures],
        }
        for run, evaluation in everything
        for benchmark, own in evaluation.figures.items()
    ]
    return {"benchmarks": names, "rows": rows, "figures": list(figures), "more": more}


def _score(evaluation: Evaluation, name: str) -> list[float | None] | None:
    if name not in evaluation.means:
        return None
    return [_short(evaluation.means[name]), _short(evaluation.standard_error(name))]


def _mean(evaluation: Evaluation, names: Sequence[str]) -> list[float | None] | None:
    if not set(names) <= evaluation.means.keys():
        return None
    errors = [evaluation.standard_error(name) for name in names]
    mean = float(np.mean([evaluation.means[name] for name in names]))
    return [_short(mean), _short(mean_error(errors))]


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns every evaluation's difference from the first of its run, and the last evaluation of
    each later run against that of the first run."""
    answered = [
        (run.label, [(e.name, e.scores) for e in run.evaluations if e.scores]) for run in runs
    ]
    pairs: list[tuple[str, str, RunScores, RunScores]] = []
    for label, evaluations in answered:
        where = f"{label}: " if len(runs) > 1 else ""
        for name, scores in evaluations[1:]:
            first, base = evaluations[0]
            pairs.append((f"{where}{name}", f"{where}{first}", scores, base))
    ends = [(label, *evaluations[-1]) for label, evaluations in answered if evaluations]
    for label, name, scores in ends[1:]:
        first_label, first, base = ends[0]
        pairs.append((f"{label}: {name}", f"{first_label}: {first}", scores, base))
    return [
        {"second": second, "first": first, **_compared(base, scores)}
        for second, first, scores, base in pairs
    ]


def _published(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Returns the paper's table if some run was evaluated on one of its benchmarks."""
    measured = {name for run in runs for evaluation in run.evaluations for name in evaluation.means}
    if measured.isdisjoint(paper.COLUMNS):
        return None
    empty = (None,) * len(paper.COLUMNS)
    rows = [[name, *paper.TABLE_4.get(name, empty), mean] for name, mean in paper.MEANS.items()]
    return {"source": paper.SOURCE, "columns": paper.COLUMNS, "rows": rows}


def _compared(base: RunScores, scores: RunScores) -> dict[str, Any]:
    def cell(result: Difference) -> dict[str, Any]:
        numbers = (result.difference, result.low, result.high, result.p)
        return {
            "numbers": [_short(number) for number in numbers],
            "items": result.items,
            "told_apart": result.told_apart,
        }

    try:
        return {"cells": {name: cell(r) for name, r in compare(base, scores).items()}}
    except DataError as error:
        return {"cells": {}, "problem": str(error)}


# --- curves ------------------------------------------------------------------------------


def _curves(
    lines: Sequence[Mapping[str, float]], x: str, max_points: int, notes: list[str]
) -> dict[str, Any]:
    """Returns {"x": [...], "y": {metric: [...]}} of the metrics that some chart shows. A long run's
    points are means over equal parts of it."""
    patterns = [re.compile(pattern) for _, patterns in CHARTS for pattern in patterns]
    names = sorted({n for line in lines for n in line if any(p.fullmatch(n) for p in patterns)})
    parts = [[line] for line in lines]
    if len(lines) > max_points:
        bounds = np.linspace(0, len(lines), max_points + 1).astype(int).tolist()
        parts = [lines[start:end] for start, end in pairwise(bounds)]
        notes.append(f"each point of the curves is the mean of {len(lines) / max_points:.1f} steps")

    def mean(part: Sequence[Mapping[str, float]], name: str) -> float | None:
        values = [line[name] for line in part if name in line]
        return _short(sum(values) / len(values)) if values else None

    return {
        "x": [mean(part, x) for part in parts],
        "y": {name: [mean(part, name) for part in parts] for name in names},
    }


def _charts(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns title, kind and metrics of each chart for which some run has values."""
    charts = []
    for title, patterns in CHARTS:
        for kind in ("steps", "tests"):
            names = dict.fromkeys(name for run in runs for name in run["curves"][kind]["y"])
            metrics = [n for p in patterns for n in names if re.fullmatch(p, n)]
            if metrics:
                charts.append({"title": title, "kind": kind, "metrics": metrics})
    return charts


def _events(run: Run, notes: list[str]) -> list[list[Any]]:
    """Returns [step, what, count] of each rule that fired, each skipped update and roll-back."""
    events: list[list[Any]] = []
    roll_backs = 0.0
    for line in run.steps:
        for name in (*RULES, "skipped"):
            if count := line.get(f"stability/{name}"):
                events.append([line["step"], name, count])
        before, roll_backs = roll_backs, line.get("stability/roll_backs", roll_backs)
        if roll_backs > before:
            events.append([line["step"], "roll_back", roll_backs - before])
    if len(events) > MAX_EVENTS:
        notes.append(f"only the last {MAX_EVENTS} of {len(events)} stability events are shown")
    return events[-MAX_EVENTS:]


# --- settings ----------------------------------------------------------------------------


def _settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the settings that differ from their default in some run, with the default and each
    run's value as text."""
    defaults = flat(Config.model_validate({"model": {"path": ""}}).model_dump(mode="json"))
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [_text(run.settings, name) for run in runs]
        if any(value != _text(defaults, name) for value in values):
            default = "" if name == "model.path" else _text(defaults, name)
            rows.append({"name": name, "default": default, "values": values})
    return rows


def _text(settings: Mapping[str, Any], name: str) -> str:
    return str(settings.get(name, ""))[:MAX_SETTING]


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) or is_number(value) else str(value)


def _short(value: float | None) -> float | None:
    """Returns five digits of a value, or None for what is no finite number."""
    return float(f"{value:.5g}") if value is not None and np.isfinite(value) else None
