"""Reads what a run has left in its folder so far."""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_qlrl.config.load import load_config
from megatron_qlrl.config.run_folder import split_parent
from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import ConfigError, DataError, RewardError
from megatron_qlrl.evaluate.compare import RunScores, read_run
from megatron_qlrl.platform.lock import SILENCE_S
from megatron_qlrl.reward.certificate import FILE, Certificate, read_certificate

TRACES = ("metrics.jsonl", "config.yaml", "starts.jsonl", "eval")
"""A folder that has none of these is no run."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    Attributes:
        name: stem of its files: `start`, a phase's name, `step_<n>` or `eval`.
        scores: every question's score; None where the answers are missing or damaged.
        means: score by benchmark, in [0, 1].
        figures: other metrics by benchmark and name: {"frames": {"pass@2": 0.7}}.
    """

    name: str
    scores: RunScores | None
    means: Mapping[str, float]
    figures: Mapping[str, Mapping[str, float]]

    def standard_error(self, benchmark: str) -> float:
        """Returns the standard error of a mean, NaN where it is not known."""
        if self.scores and benchmark in self.scores.scores:
            return self.scores.standard_error(benchmark)
        return self.figures[benchmark].get("standard_error", math.nan)


@dataclass(frozen=True)
class Run:
    """What one run folder holds.

    Attributes:
        label: how the page names the run.
        config: None where config.yaml is missing or of another version.
        settings: the content of config.yaml by dotted name.
        starts: lines of starts.jsonl.
        steps: lines of metrics.jsonl about a training step; finite numbers only.
        tests: lines of metrics.jsonl about an evaluation, each with "steps_done" before it.
        certificate: what the judge was measured to be worth; None where the config names no
            certificate, or its copy in the folder is missing or damaged.
        is_held: whether a process is working in the folder.
        notes: what could not be read.
    """

    label: str
    folder: Path
    config: Config | None
    settings: Mapping[str, Any]
    starts: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, float]]
    tests: Sequence[Mapping[str, float]]
    evaluations: Sequence[Evaluation]
    is_held: bool
    certificate: Certificate | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """Returns "rl", "sft" or "eval", as the record shows, or "" before its first line."""
        if any("sft/nll" in line for line in self.steps):
            return "sft"
        return "rl" if self.steps else "eval" if self.evaluations else ""

    @property
    def steps_done(self) -> int:
        return int(self.steps[-1]["step"]) + 1 if self.steps else 0

    @property
    def parent(self) -> tuple[Path, int] | None:
        """Returns the folder of the run that this one began from, and that run's step."""
        text = self.config.run.parent if self.config and self.command == "rl" else None
        if text is None:
            return None
        folder, step = split_parent(text)
        return None if step is None else (folder.resolve(), step)


def read_with_parents(folders: Sequence[Path]) -> list[Run]:
    """Reads each folder once, in the order given, and before each run the one that it began from,
    if that is at hand.

    Raises:
        DataError: a folder is no run.
    """
    named = read_runs(folders)
    runs: list[Run] = []
    for run in named:
        parent = run.parent[0] if run.parent else None
        known = {other.folder for other in (*named, *runs)}
        if parent and parent not in known and _is_run(parent):
            runs += read_runs([parent])
        runs.append(run)
    labels = _labels([run.folder for run in runs])
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads each folder once, in the order given.

    Raises:
        DataError: a folder is no run.
    """
    resolved = list(dict.fromkeys(folder.resolve() for folder in folders))
    for folder in resolved:
        if not _is_run(folder):
            raise DataError(
                f"{folder} is no run folder: it has none of {', '.join(TRACES)}; name the run.dir "
                "of a run"
            )
    return [_read(f, label) for f, label in zip(resolved, _labels(resolved), strict=True)]


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in TRACES)


def _labels(folders: Sequence[Path]) -> list[str]:
    """Returns as many of the last parts of each path as tell the folders apart."""
    for length in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, label: str) -> Run:
    notes: list[str] = []
    steps: list[dict[str, float]] = []
    tests: list[dict[str, float]] = []
    for line in read_jsonl(folder / "metrics.jsonl", notes):
        numbers = {k: v for k, v in line.items() if is_number(v)}
        if not isinstance(numbers.get("step"), int):
            continue
        if any(name.startswith("val/") for name in numbers):
            tests.append(numbers | {"steps_done": steps[-1]["step"] + 1 if steps else 0})
        else:
            steps.append(numbers)
    behaviours = _behaviours(folder / "behaviours.json", notes)
    steps = [line | behaviours.get(int(line["step"]), {}) for line in steps]
    config, settings = _config(folder / "config.yaml", notes)
    evaluations = [_evaluation(path, notes) for path in folder.glob("eval/*.json")]
    return Run(
        label=label,
        folder=folder,
        config=config,
        settings=settings,
        starts=list(read_jsonl(folder / "starts.jsonl", notes)),
        steps=steps,
        tests=tests,
        evaluations=sorted(evaluations, key=lambda evaluation: place(evaluation.name, config)),
        certificate=_certificate(folder / FILE, config, notes),
        is_held=any(time.time() - _changed(p) < SILENCE_S for p in folder.glob("run.lock.*")),
        notes=notes,
    )


def _certificate(path: Path, config: Config | None, notes: list[str]) -> Certificate | None:
    judge = config.reward.judge if config else None
    if judge is None or judge.certificate is None:
        return None
    try:
        return read_certificate(path)
    except RewardError as error:
        notes.append(f"the judge's certificate is left out: {error}")
        return None


def _behaviours(path: Path, notes: list[str]) -> dict[int, dict[str, float]]:
    """Returns the means that `qlrl behaviours` has left, by step and metric name."""
    if not path.is_file():
        return {}
    means: dict[int, dict[str, float]] = {}
    try:
        for step in json.loads(path.read_text(encoding="utf-8"))["steps"]:
            named = (("patterns", step["lexical"]), ("judge", step["judge"] or {}))
            means[int(step["step"])] = {
                f"behaviours/{by}/{name}": value
                for by, own in named
                for name, value in own.items()
                if is_number(value)
            }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        notes.append(f"{path.name} is damaged and left out")
        return {}
    return means


def read_jsonl(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file that may still be written; adds to `notes` what is no object,
    unless it is a last line without an end."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return
    *lines, unfinished = text.split("\n")  # not splitlines: answers may hold other line ends
    damaged = 0
    for line in [*lines, *filter(None, [unfinished])]:
        try:
            value = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            yield value
        else:
            damaged += line is not unfinished
    if damaged:
        notes.append(f"{path.name}: {damaged} line(s) are damaged and left out")


def is_number(value: Any) -> bool:
    """Returns whether `value` can be drawn: finite, and within what a float holds."""
    return isinstance(value, int | float) and -1e300 < value < 1e300


def _config(path: Path, notes: list[str]) -> tuple[Config | None, dict[str, Any]]:
    try:
        config = load_config(path)
    except ConfigError as error:
        notes.append(f"compared with no defaults: {str(error).splitlines()[0]}")
    else:
        return config, flat(config.model_dump(mode="json"))
    try:
        return None, flat(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None, {}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested mappings and of lists of mappings by dotted name."""
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix: tree} if prefix else {}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _evaluation(path: Path, notes: list[str]) -> Evaluation:
    try:
        metrics = json.loads(path.read_text(encoding="utf-8")).items()
    except (OSError, ValueError, RecursionError, AttributeError):
        metrics = ()
    figures: dict[str, dict[str, float]] = {}
    for name, value in metrics:
        parts = re.fullmatch(r"val/([^/]+)/(.+)", name)
        if parts and parts[1] != "reward" and is_number(value):
            figures.setdefault(parts[1], {})[parts[2]] = float(value)
    means = {name: own.pop("score") for name, own in figures.items() if "score" in own}
    try:
        scores = read_run(path)
    except DataError as error:
        notes.append(f"evaluation {path.stem} has no errors: {error}")
        scores = None
    return Evaluation(path.stem, scores, means, figures)


def place(name: str, config: Config | None) -> tuple[float, str]:
    """Returns what sorts evaluations: the step before which one was made. The times of its files
    do not say it, because copies have others."""
    step = re.fullmatch(r"step_(\d{1,9})", name)
    places = {"start": 0.0} | ({name: float(step[1])} if step else {})
    end = 0
    for phase in config.phases if config else ():
        end += phase.steps
        places[phase.name] = end
    return places.get(name, math.inf), name


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed since it was listed
        return 0.0
