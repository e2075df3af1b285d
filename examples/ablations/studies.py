"""Starts the runs of a study, and reads what they answered."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np

Scores = dict[str, dict[str, float]]
"""By size of the documents ("short", "long") and question."""
NUM_RESAMPLES = 10_000


def read_arguments(description: str) -> argparse.Namespace:
    """Reads what the command line of a study says: out, seeds, jobs, table."""
    parser = argparse.ArgumentParser(description=description.split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="train nothing")
    return parser.parse_args()


def train(config: Path, folder: Path, command: str, *settings: str) -> None:
    """Runs `qlrl` unless the run is finished; the Hugging Face folder is what a run writes last."""
    if (folder / "hf" / "README.md").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    qlrl(folder / "log.txt", command, config, f"run.dir={folder}", *settings)
    print(f"done: {folder}", flush=True)


def qlrl(log: Path, *argv: object) -> None:
    """Runs `qlrl` on one thread; its output goes into the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_qlrl", *map(str, argv)],
            check=False,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        sys.exit(f"ablations: {log} ends with an error; mend it, then the same command continues")


def read_scores(answers: Path) -> Scores:
    """Reads an evaluation's eval/<name>.jsonl."""
    scores: Scores = {}
    for record in map(json.loads, answers.read_text().splitlines()):
        file, _, row = record["uid"].rpartition(":")
        scores.setdefault(file.removeprefix("eval_"), {})[row] = record["score"]
    return scores


def differences(one: Scores, two: Scores, size: str) -> list[float]:
    """Returns what `one` scores above `two` on each question."""
    assert one[size].keys() == two[size].keys()
    return [one[size][row] - two[size][row] for row in one[size]]


def interval(runs: Sequence[Sequence[float]]) -> str:
    """Returns the mean of `runs` [seeds, documents] in points, with a 95 % percentile interval of a
    bootstrap that draws documents and seeds again."""
    values, rng = np.array(runs), np.random.default_rng(0)
    num_seeds, num_documents = values.shape
    means = [
        values[rng.integers(num_seeds, size=num_seeds)][
            :, rng.integers(num_documents, size=num_documents)
        ].mean()
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = 100 * np.percentile(means, [2.5, 97.5])
    return f"{100 * values.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def percent(values: Sequence[float]) -> str:
    return spread([100 * value for value in values], 1)


def spread(values: Sequence[float], digits: int) -> str:
    """Returns the mean and, of several values, their sample standard deviation as text."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text
