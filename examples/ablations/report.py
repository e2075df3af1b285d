"""Writes the ablations' tables and curves from the records (metrics.jsonl) and the answers
(eval/*.jsonl) of the runs."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from arms import ARMS, LIMITS, MAIN, SFT_STEPS, TRADE_OFF, Arm, Curriculum
from matplotlib.figure import Figure
from studies import Scores, differences, interval, percent, read_scores, spread

SIZES = tuple(LIMITS)
STARTS = {"base": "no SFT", "sft": "SFT"}
PAIRS: tuple[tuple[Curriculum, Curriculum], ...] = (
    ("phased", "single"),
    ("phased", "mixed"),
    ("retrospective", "phased"),
)
CURVES = {
    "reward (sampled)": "critic/rewards/mean",
    "entropy": "actor/entropy",
    "KL to the start": "actor/kl_loss",
    **{f"accuracy, {size} documents": f"val/eval_{size}/score" for size in SIZES},
}
COLORS = {
    "single": "tab:red",
    "mixed": "tab:orange",
    "phased": "tab:blue",
    "retrospective": "tab:green",
}
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
    scores = {arm: [last_scores(out / arm.name / f"seed_{s}") for s in seeds] for arm in ARMS}
    tables = (table(results), curricula(scores), trade_off(results))
    (folder / "table.md").write_text("\n\n".join(tables) + "\n")
    for start in ("sft", "base"):
        arms = [arm for arm in MAIN if arm.start == start]
        draw(folder / f"curves_{start}.png", {arm: records[arm] for arm in arms})
    print((folder / "table.md").read_text())


def read(folder: Path) -> Record:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last_scores(folder: Path) -> Scores:
    """Reads the answers to the evaluation after the last phase, which is `longer` in all arms."""
    return read_scores(folder / "eval" / "longer.jsonl")


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
        "| start | curriculum | short, % | long, % | longer, % | mean, % | entropy "
        "| KL | KL, highest | RL tokens, M |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in MAIN:
        runs = results[arm.name]
        cells = [
            STARTS[arm.start],
            arm.curriculum,
            *(percent([run[size] for run in runs]) for size in SIZES),
            percent([mean(run[size] for size in SIZES) for run in runs]),
            spread([run["entropy"] for run in runs], 3),
            spread([run["kl"] for run in runs], 3),
            f"{max(run['kl_max'] for run in runs):.2f}",
            spread([run["tokens"] / 1e6 for run in runs], 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curricula(scores: dict[Arm, list[Scores]]) -> str:
    """Compares curricula with the same start seed by seed and document by document."""
    lines = [
        "| start | points, 95 % interval over documents and seeds | short | long | longer |",
        "|---|---|---|---|---|",
    ]
    for start, name in STARTS.items():
        arms = {arm.curriculum: arm for arm in MAIN if arm.start == start}
        for ours, theirs in PAIRS:
            runs = list(zip(scores[arms[ours]], scores[arms[theirs]], strict=True))
            cells = [interval([differences(one, two, size) for one, two in runs]) for size in SIZES]
            lines.append(f"| {name} | {ours} minus {theirs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def trade_off(results: dict[str, list[dict[str, float]]]) -> str:
    """Compares short and long SFT, and what RL adds to each."""
    headers = " | ".join(f"{size}, % after SFT | after RL" for size in SIZES)
    lines = [f"| SFT steps | {headers} | gain of the mean |", "|---" * (2 * len(SIZES) + 2) + "|"]
    after_short = Arm("sft", TRADE_OFF.curriculum)
    for arm in (after_short, TRADE_OFF):
        runs = results[arm.name]
        gains = [mean(run[size] - run[f"start_{size}"] for size in SIZES) for run in runs]
        cells = [str(SFT_STEPS[arm.start])]
        for size in SIZES:
            cells += [percent([r[f"start_{size}"] for r in runs]), percent([r[size] for r in runs])]
        lines.append("| " + " | ".join([*cells, percent(gains)]) + " |")
    return "\n".join(lines)


def draw(path: Path, records: dict[Arm, list[Record]]) -> None:
    """Draws the mean and the range of the seeds over the tokens used."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (title, metric) in zip(axes.flat, CURVES.items(), strict=True):
        for arm, runs in records.items():
            x, y = zip(*(curve(run, metric) for run in runs), strict=True)
            ends = [xs[-1] for xs in x]
            grid = np.linspace(max(xs[0] for xs in x), min(ends), 60)
            lines = np.stack([np.interp(grid, xs, ys) for xs, ys in zip(x, y, strict=True)])
            color = COLORS[arm.curriculum]
            axis.plot(grid / 1e6, lines.mean(0), color=color, label=arm.curriculum)
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
