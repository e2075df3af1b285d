"""Writes the ablations' tables and curves from the records (metrics.jsonl) of the runs."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import ARMS, MAIN, SFT_STEPS, TRADE_OFF, Arm
from matplotlib.figure import Figure

SIZES = ("short", "long")
STARTS = {"base": "no SFT", "sft": "SFT"}
CURVES = {
    "reward (sampled)": "critic/rewards/mean",
    "entropy": "actor/entropy",
    "KL to the start": "actor/kl_loss",
    "response length": "response_length/mean",
    "accuracy, short documents": "val/eval_short/score",
    "accuracy, long documents": "val/eval_long/score",
}
COLORS = {"single": "tab:red", "phased": "tab:blue", "retrospective": "tab:green"}
LINES = {"grpo": "-", "dapo": "--"}
WINDOW = 5
"""The number of steps over which curves of training metrics are averaged."""

Record = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of run.py")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    report(args.out, range(args.seeds))


def report(out: Path, seeds: Iterable[int]) -> None:
    """Writes results.json, table.md, curves_sft.png and curves_base.png into OUT/report."""
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    seeds = list(seeds)
    records = {arm: [read(out / arm.name / f"seed_{s}") for s in seeds] for arm in ARMS}
    results = {arm.name: [summary(r) for r in records[arm]] for arm in ARMS}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    tables = (table(results), against_single(results), trade_off(results))
    (folder / "table.md").write_text("\n\n".join(tables) + "\n")
    for start in ("sft", "base"):
        arms = [arm for arm in MAIN if arm.start == start]
        draw(folder / f"curves_{start}.png", {arm: records[arm] for arm in arms})
    print((folder / "table.md").read_text())


def read(folder: Path) -> Record:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(record: Record) -> dict[str, float]:
    """Returns a run's figures for the tables; entropy and KL are means of its last WINDOW steps."""
    steps = [line for line in record if "perf/total_num_tokens" in line]
    evals = [line for line in record if "val/eval_long/score" in line]
    figures = {"tokens": float(sum(line["perf/total_num_tokens"] for line in steps))}
    for size in SIZES:
        figures[f"start_{size}"] = evals[0][f"val/eval_{size}/score"]
        figures[size] = evals[-1][f"val/eval_{size}/score"]
    # A step without an update (no group with spread) has no entropy and no KL.
    updated = [line for line in steps if "actor/entropy" in line]
    for name, metric in (("entropy", "actor/entropy"), ("kl", "actor/kl_loss")):
        figures[name] = float(np.mean([line[metric] for line in updated[-WINDOW:]]))
        figures[f"{name}_max"] = max(line[metric] for line in updated)
    figures["entropy_min"] = min(line["actor/entropy"] for line in updated)
    carried = [line.get("curriculum/carried/drawn", 0.0) for line in steps]
    solved = [line.get("curriculum/carried/solved", 0.0) for line in steps]
    return figures | {"carried_drawn": sum(carried), "carried_solved": sum(solved)}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "| start | curriculum | algorithm | short, % | long, % | mean, % | entropy | KL | KL, "
        "highest | RL tokens, M |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in MAIN:
        runs = results[arm.name]
        average = [(r["short"] + r["long"]) / 2 for r in runs]
        cells = [
            STARTS[arm.start],
            arm.curriculum,
            arm.algorithm.upper(),
            *(percent([r[size] for r in runs]) for size in SIZES),
            percent(average),
            spread([r["entropy"] for r in runs], 3),
            spread([r["kl"] for r in runs], 3),
            f"{max(r['kl_max'] for r in runs):.2f}",
            spread([r["tokens"] / 1e6 for r in runs], 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_single(results: dict[str, list[dict[str, float]]]) -> str:
    """Compares with the single phase, seed by seed: same start, budget and evaluation."""
    lines = [
        "| start | algorithm | against single | short, points | long, points | mean, points |",
        "|---|---|---|---|---|---|",
    ]
    for arm in MAIN:
        if arm.curriculum == "single":
            continue
        single = Arm(arm.start, "single", arm.algorithm)
        pairs = list(zip(results[arm.name], results[single.name], strict=True))
        changes = {size: [ours[size] - theirs[size] for ours, theirs in pairs] for size in SIZES}
        average = [(s + k) / 2 for s, k in zip(*changes.values(), strict=True)]
        cells = [STARTS[arm.start], arm.algorithm.upper(), arm.curriculum]
        cells += [percent(values) for values in (*changes.values(), average)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trade_off(results: dict[str, list[dict[str, float]]]) -> str:
    """Compares short and long SFT, and what RL adds to each."""
    lines = [
        "| SFT steps | short, % after SFT | after RL | long, % after SFT | after RL | gain of the "
        "mean |",
        "|---|---|---|---|---|---|",
    ]
    after_short = Arm("sft", TRADE_OFF.curriculum, TRADE_OFF.algorithm)
    for arm in (after_short, TRADE_OFF):
        runs = results[arm.name]
        gains = [(r["short"] + r["long"] - r["start_short"] - r["start_long"]) / 2 for r in runs]
        cells = [str(SFT_STEPS[arm.start])]
        for size in SIZES:
            cells += [percent([r[f"start_{size}"] for r in runs]), percent([r[size] for r in runs])]
        lines.append("| " + " | ".join([*cells, percent(gains)]) + " |")
    return "\n".join(lines)


def percent(values: Sequence[float]) -> str:
    return spread([100 * v for v in values], 1)


def spread(values: Sequence[float], digits: int) -> str:
    """Returns mean and sample standard deviation as text."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def draw(path: Path, records: dict[Arm, list[Record]]) -> None:
    """Draws the mean and the range of the seeds over the tokens used."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (title, metric) in zip(axes.T.flat, CURVES.items(), strict=True):
        for arm, runs in records.items():
            x, y = zip(*(curve(run, metric) for run in runs), strict=True)
            ends = [xs[-1] for xs in x]
            grid = np.linspace(max(xs[0] for xs in x), min(ends), 60)
            lines = np.stack([np.interp(grid, xs, ys) for xs, ys in zip(x, y, strict=True)])
            color, line = COLORS[arm.curriculum], LINES[arm.algorithm]
            name = f"{arm.curriculum}, {arm.algorithm.upper()}"
            axis.plot(grid / 1e6, lines.mean(0), line, color=color, label=name)
            axis.fill_between(grid / 1e6, lines.min(0), lines.max(0), color=color, alpha=0.1)
        axis.set_title(title)
        axis.set_xlabel("RL tokens, M")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=90)


def curve(record: Record, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens used and the metric's values; training metrics are running means."""
    used, x, y = 0.0, [], []
    for line in record:
        used += line.get("perf/total_num_tokens", 0.0)
        if metric in line:
            x.append(used)
            y.append(line[metric])
    values = np.array(y)
    if not metric.startswith("val/"):
        # The window is shorter at the beginning, so that the curve starts at the first value.
        values = np.array([values[max(0, i - WINDOW + 1) : i + 1].mean() for i in range(len(y))])
    return np.array(x), values


if __name__ == "__main__":
    main()
