"""Compares the evaluations of runs question by question.

    <run.dir>/eval/<name>.json, .jsonl -> RunScores -> pairs of questions -> Difference

Two runs are compared on the questions that both have, each by the mean of its samples' verdicts. A
benchmark counts as its mean over questions, all benchmarks as the unweighted mean of these.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qlrl.errors import DataError
from megatron_qlrl.evaluate.statistics import largest, mean_error, points, standard_error

NUM_RESAMPLES = 10_000
_CHUNK = 1 << 22  # numbers drawn at once


@dataclass(frozen=True)
class RunScores:
    """One evaluation.

    Attributes:
        label: how tables name it.
        scores: by benchmark and uid, the mean of the verdicts, in [0, 1]; without questions that
            have no verdict.
        asked: by uid, the question and its gold.
        several: what `statistics` makes of several samples, by benchmark: pass@k and maj@n.
        masked: responses without a verdict, by benchmark.
    """

    label: str
    scores: Mapping[str, Mapping[str, float]]
    asked: Mapping[str, tuple[str, str]]
    several: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    masked: Mapping[str, int] = field(default_factory=dict)

    def mean(self, benchmark: str) -> float:
        return float(np.mean(list(self.scores[benchmark].values())))

    def standard_error(self, benchmark: str) -> float:
        return standard_error(list(self.scores[benchmark].values()))


@dataclass(frozen=True)
class Difference:
    """How much higher one run scores than another, in [-1, 1].

    Attributes:
        low, high: bounds of the 95 % interval.
        p: two-sided; how often resampled differences fall on the other side of 0, doubled.
        items: number of paired questions.
    """

    difference: float
    low: float
    high: float
    p: float
    items: int

    @property
    def told_apart(self) -> bool:
        return not self.low <= 0 <= self.high


def paired_bootstrap(
    differences: Sequence[np.ndarray], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Difference:
    """Returns the mean over benchmarks of the mean difference, with a percentile interval.

    Args:
        differences: for each benchmark, float [questions]: what the second run scores above the
            first on each question. Questions are drawn again within their benchmark.
    """
    assert differences and all(len(d) for d in differences)
    rng = np.random.default_rng(seed)
    means = np.zeros(num_resamples)
    for values in differences:
        step = max(1, _CHUNK // len(values))
        for start in range(0, num_resamples, step):
            part = means[start : start + step]
            part += values[rng.integers(len(values), size=(len(part), len(values)))].mean(axis=1)
    means = np.round(means / len(differences), 12)  # thirds of samples sum to no exact 0
    low, high = np.percentile(means, [2.5, 97.5])
    beyond = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return Difference(
        difference=float(np.mean([d.mean() for d in differences])),
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * (1 + beyond) / (1 + num_resamples)),
        items=sum(map(len, differences)),
    )


def compare(
    first: RunScores, second: RunScores, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """Returns what `second` scores above `first` by benchmark, and as "mean" over all of them.

    Raises:
        DataError: they share no question, or a uid stands for different questions.
    """
    paired: dict[str, np.ndarray] = {}
    for benchmark, scores in first.scores.items():
        others = second.scores.get(benchmark, {})
        shared = [uid for uid in scores if uid in others]
        for uid in shared:
            if first.asked[uid] != second.asked[uid]:
                raise DataError(
                    f"{first.label} and {second.label} were asked different questions under "
                    f"{uid}; evaluate both on the same file"
                )
        if shared:
            paired[benchmark] = np.array([others[uid] - scores[uid] for uid in shared])
    if not paired:
        raise DataError(f"{first.label} and {second.label} share no question with a verdict")
    settings: Any = {"num_resamples": num_resamples, "seed": seed}
    result = {name: paired_bootstrap([d], **settings) for name, d in paired.items()}
    return result | {"mean": paired_bootstrap(list(paired.values()), **settings)}


def read_run(path: Path) -> RunScores:
    """Reads an evaluation.

    Args:
        path: <run.dir>, whose newest evaluation is read, or one of <run.dir>/eval/<name>.json and
            .jsonl.

    Raises:
        DataError: it lacks a file, or one is damaged or belongs to another evaluation.
    """
    if path.is_dir():
        answers = sorted(path.glob("eval/*.jsonl"), key=lambda f: (f.stat().st_mtime_ns, f.name))
        if not answers:
            raise DataError(f"{path} has no eval/*.jsonl; run `qlrl eval` first")
        path = answers[-1]
    label = f"{path.parent.parent} ({path.stem})"
    verdicts: dict[str, list[float]] = {}
    masked = Counter[str]()
    asked: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(_read(path.with_suffix(".jsonl")).splitlines(), start=1):
        where = f"{path.with_suffix('.jsonl')}, line {number}"
        try:
            record = json.loads(line)
            uid, score = str(record["uid"]), record["score"]
            asked[uid] = (record["question"], record["ground_truth"])
            verdicts.setdefault(uid, []).extend([] if score is None else [float(score)])
            masked[uid.rpartition(":")[0]] += score is None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{where}: no answer of an evaluation ({error!r})") from error
    scores: dict[str, dict[str, float]] = {}
    for uid, values in verdicts.items():
        if values:
            scores.setdefault(uid.rpartition(":")[0], {})[uid] = float(np.mean(values))
    result = RunScores(label, scores, asked, masked=masked)
    metrics = _checked_metrics(path.with_suffix(".json"), result)
    several = {
        name: {
            key.rpartition("/")[2]: value
            for key, value in metrics.items()
            if key.startswith((f"val/{name}/pass@", f"val/{name}/maj@"))
        }
        for name in scores
    }
    return replace(result, several=several)


def _checked_metrics(path: Path, run: RunScores) -> dict[str, float]:
    """Returns the metrics of the file.

    Raises:
        DataError: they do not follow from the answers beside them.
    """
    try:
        metrics = {key: float(value) for key, value in json.loads(_read(path)).items()}
        known = {name: metrics[f"val/{name}/score"] for name in run.scores}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: no scores of the answers beside it ({error!r})") from error
    for name, value in known.items():
        if abs(value - run.mean(name)) > 1e-6:
            raise DataError(
                f"{path}: val/{name}/score is {value:g}, the answers beside it give "
                f"{run.mean(name):g}; one of the files is of another evaluation"
            )
    return metrics


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def comparison_lines(
    runs: Sequence[RunScores], compared: Sequence[Mapping[str, Difference]]
) -> list[str]:
    """Returns the scores of all runs with standard errors (with pass@k of the largest k and maj@n,
    and how many responses are masked, where there are any), then each later run against the first,
    as lines of text in points of 100."""
    width = max(len("benchmark"), *(len(name) for run in runs for name in run.scores)) + 2
    columns = [max(len(run.label), 14) + 2 for run in runs]
    lines = ["Measured:", f"{'benchmark':<{width}}" + _cells([r.label for r in runs], columns)]
    names = list(dict.fromkeys(name for run in runs for name in run.scores))
    for name in names:
        lines.append(f"{name:<{width}}" + _cells([_score(run, name) for run in runs], columns))
        for kind in ("pass@", "maj@"):
            cells = [largest(run.several.get(name, {}), kind) for run in runs]
            if set(cells) != {"-"}:
                lines.append(f"{'':<{width}}" + _cells(cells, columns))
        masked = [run.masked.get(name, 0) for run in runs]
        if any(masked):
            cells = [f"masked {count}" for count in masked]
            lines.append(f"{'':<{width}}" + _cells(cells, columns))
    shared = [run for run in runs if set(names) == set(run.scores)]
    if len(names) > 1:
        cells = [_mean(run, names) if run in shared else "-" for run in runs]
        lines.append(f"{'mean':<{width}}" + _cells(cells, columns))
    for run, differences in zip(runs[1:], compared, strict=True):
        lines += ["", f"{run.label} minus {runs[0].label}, 95 % interval, paired by question:"]
        for name, result in differences.items():
            verdict = "" if result.told_apart else "  cannot be told apart"
            lines.append(
                f"{name:<{width}}{100 * result.difference:>+7.1f}  "
                f"[{100 * result.low:+.1f}, {100 * result.high:+.1f}]  p={result.p:.2g}  "
                f"({result.items} questions){verdict}"
            )
    return lines


def _cells(texts: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def _score(run: RunScores, name: str) -> str:
    return points(run.mean(name), run.standard_error(name)) if name in run.scores else "-"


def _mean(run: RunScores, names: Sequence[str]) -> str:
    mean = float(np.mean([run.mean(name) for name in names]))
    return points(mean, mean_error([run.standard_error(name) for name in names]))
