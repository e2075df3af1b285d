"""Starts the runs of a study, and reads what they answered."""

import json
import os
import subprocess
import sys
from pathlib import Path

Scores = dict[str, dict[str, float]]
"""By size of the documents ("short", "long") and question."""


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
