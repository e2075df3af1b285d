"""Counts the behaviours of a run's responses step by step, and compares judge and patterns.

rollouts/step_*.jsonl -> patterns, judge -> behaviours.jsonl (a line a response), behaviours.json
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qlrl.behaviours.judge import Asked, Counts
from megatron_qlrl.behaviours.lexical import BEHAVIOURS, lexical_counts
from megatron_qlrl.errors import DataError
from megatron_qlrl.report.read import read_jsonl

# Responses -> their counts, None where there is no verdict.
AskJudge = Callable[[Sequence[Asked]], Sequence[Counts | None]]


@dataclass(frozen=True)
class Agreement:
    """How far the judge's counts and the patterns' agree on one behaviour.

    Attributes:
        responses: those with a verdict.
        exact: share of them with the same count, None without any.
        spearman: rank correlation, None where either side's counts are all the same.
    """

    responses: int
    exact: float | None
    spearman: float | None


@dataclass(frozen=True)
class Step:
    """Means over the responses of one step, by behaviour.

    Attributes:
        step: None for a file of responses that belongs to no step.
        judge: over the responses with a verdict; None without any, or without a judge.
        no_verdict: responses that the judge gave no counts for; None without a judge.
    """

    step: int | None
    responses: int
    lexical: dict[str, float]
    judge: dict[str, float] | None
    no_verdict: int | None


@dataclass
class Behaviours:
    """What is counted, step by step; `notes` say what could not be read."""

    steps: list[Step] = field(default_factory=list[Step])
    agreement: dict[str, Agreement] = field(default_factory=dict[str, Agreement])
    notes: list[str] = field(default_factory=list[str])


def response_files(path: Path) -> list[tuple[int | None, Path]]:
    """Returns the files of responses with their steps: the rollout log of a run folder, or `path`
    itself if it is a file.

    Raises:
        DataError: there are none.
    """
    if path.is_file():
        return [(None, path)]
    names = sorted((path / "rollouts").glob("step_*.jsonl"))
    files = [(int(number), name) for name in names
             if (number := name.stem.removeprefix("step_")).isdecimal()]  # fmt: skip
    if not files:
        raise DataError(
            f"{path} has no rollout log (rollouts/step_*.jsonl); name the run.dir of an RL run "
            "with logging.rollouts_per_step, or a JSONL file of responses such as eval/eval.jsonl"
        )
    return [*files]


def count_behaviours(
    files: Sequence[tuple[int | None, Path]],
    *,
    ask: AskJudge | None,
    per_step: int | None,
    write: Callable[[dict[str, Any]], None],
) -> Behaviours:
    """Counts every response, one file in memory at a time.

    Args:
        ask: the judge, or None for patterns alone.
        per_step: at most this many responses of a file, spread evenly over it; None takes all.
        write: gets a record for each response, in order.

    Raises:
        DataError: no file holds a response.
    """
    result = Behaviours()
    pairs: list[tuple[dict[str, int], Counts]] = []
    for step, file in files:
        records = [r for r in read_jsonl(file, result.notes) if isinstance(r.get("response"), str)]
        if per_step is not None and len(records) > per_step:
            records = [records[i * len(records) // per_step] for i in range(per_step)]
        if not records:
            continue
        lexical = [lexical_counts(record["response"]) for record in records]
        asked = [Asked(str(r.get("question") or ""), r["response"]) for r in records]
        judged = ask(asked) if ask is not None else [None] * len(records)
        for record, own, counts in zip(records, lexical, judged, strict=True):
            write(
                {"step": step, "uid": record.get("uid"), "sample": record.get("sample")}
                | {"lexical": own, "judge": None if counts is None else counts.model_dump()}
            )
            if counts is not None:
                pairs.append((own, counts))
        verdicts = [counts.model_dump() for counts in judged if counts is not None]
        result.steps.append(
            Step(
                step=step,
                responses=len(records),
                lexical=_means(lexical),
                judge=_means(verdicts) if verdicts else None,
                no_verdict=None if ask is None else len(records) - len(verdicts),
            )
        )
    if not result.steps:
        raise DataError(f"{files[0][1]}: no line has a field `response`")
    if ask is not None:
        result.agreement = {
            name: agreement(
                [own[name] for own, _ in pairs], [getattr(counts, name) for _, counts in pairs]
            )
            for name in BEHAVIOURS
        }
    return result


def _means(counts: Sequence[dict[str, int]]) -> dict[str, float]:
    return {name: float(np.mean([own[name] for own in counts])) for name in BEHAVIOURS}


def agreement(first: Sequence[int], second: Sequence[int]) -> Agreement:
    """Returns how far two counts of the same responses agree."""
    if not first:
        return Agreement(0, None, None)
    exact = float(np.mean(np.equal(first, second)))
    a, b = _ranks(first), _ranks(second)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Agreement(len(first), exact, None)
    return Agreement(len(first), exact, float(np.corrcoef(a, b)[0, 1]))


def _ranks(values: Sequence[int]) -> np.ndarray:
    """Returns ranks (float64 [N]); equal values share the mean of their ranks."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def behaviour_lines(result: Behaviours) -> list[str]:
    """Returns a table of the means by step, then the agreement."""
    judged = any(step.no_verdict is not None for step in result.steps)
    head = "".join(f"{name:>17}" for name in BEHAVIOURS)
    lines = [f"{'step':<8}{'responses':>10}  {'counted by':<10}{head}"]
    for step in result.steps:
        name = "-" if step.step is None else str(step.step)
        lines.append(f"{name:<8}{step.responses:>10}  {'patterns':<10}{_shown(step.lexical)}")
        if step.no_verdict is not None:
            verdicts = step.responses - step.no_verdict
            note = f"   {step.no_verdict} without a verdict" if step.no_verdict else ""
            lines.append(f"{'':<8}{verdicts:>10}  {'judge':<10}{_shown(step.judge)}{note}")
    if judged:
        for title, of in (("same count", "exact"), ("Spearman", "spearman")):
            values = [getattr(own, of) for own in result.agreement.values()]
            shown = "".join(f"{'-' if v is None else f'{v:.2f}':>17}" for v in values)
            lines.append(f"{'':<8}{'':>10}  {title:<10}{shown}")
    return lines


def _shown(means: dict[str, float] | None) -> str:
    return "".join(f"{'-' if means is None else f'{means[name]:.2f}':>17}" for name in BEHAVIOURS)
