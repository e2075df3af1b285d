"""What several samples of each question say beyond their mean: standard errors, pass@k, maj@n, and
scores by prompt length. Samples without a verdict (no judge) are left out; empty and unfinished
responses have a verdict, usually 0, and count.
"""

from collections.abc import Mapping, Sequence
from math import comb

import numpy as np

from megatron_qlrl.reward.text import normalize
from megatron_qlrl.types import ScoredGroup

BUCKETS = {"0-8K": 8, "8-16K": 16, "16-32K": 32, "32-64K": 64, "64-128K": 128}
"""Lengths of prompts by the 1,024 tokens that they stay below."""


def pass_at_k(scores: Sequence[float], k: int) -> float:
    """Returns the expected best score of `k` of the samples, drawn without replacement.

    With c right (1) and n - c wrong (0) samples this is the unbiased 1 - C(n - c, k) / C(n, k) of
    Chen et al. (arXiv 2107.03374); scores in between, as of MRCR, count as they are.
    """
    n = len(scores)
    assert 1 <= k <= n, (k, n)
    # The i-th smallest (from 0) is the best of C(i, k - 1) draws.
    return sum(comb(i, k - 1) * s for i, s in enumerate(sorted(scores))) / comb(n, k)


def majority(answers: Sequence[str], scores: Sequence[float | None]) -> float | None:
    """Returns the score of the most frequent answer, or None if no sample has a verdict.

    Answers are the same if `normalize` makes them so. Empty ones and those without a verdict have
    no vote, and without a vote the score is 0. Answers with equally many votes share: the result is
    the mean of their scores, which is what a draw among them is expected to give. The score of an
    answer is the mean over its samples, since a judge may have given two verdicts.
    """
    if all(score is None for score in scores):
        return None
    votes: dict[str, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer.strip() and score is not None:
            votes.setdefault(normalize(answer) or answer.strip(), []).append(score)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    return float(np.mean([np.mean(own) for own in votes.values() if len(own) == most]))


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean over questions, NaN for a single one."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else np.nan


def mean_error(errors: Sequence[float]) -> float:
    """Returns the standard error of the unweighted mean over benchmarks from that of each."""
    return float(np.sqrt(np.sum(np.square(errors))) / len(errors))


def bucket(num_tokens: int) -> str:
    """Returns the name of the range of prompt lengths that `num_tokens` falls into."""
    return next((name for name, end in BUCKETS.items() if num_tokens < 1024 * end), "128K-")


def statistics(answers: Mapping[str, Sequence[ScoredGroup]]) -> dict[str, float]:
    """Returns, for each benchmark and below `val/<benchmark>/`: `standard_error` of the score over
    questions; `questions` with a verdict; `no_answer`, the share of responses without one;
    `pass@k` for k = 2, 4, 8, ... up to the number of samples n, over the questions with k verdicts;
    `maj@n`; `score/<bucket>` and `questions/<bucket>` for the lengths that occur. Also
    `val/standard_error`, that of `val/score`. What cannot be computed is left out.
    """
    result: dict[str, float] = {}
    errors = []
    for name, groups in answers.items():
        own = _of_benchmark(groups)
        result |= {f"val/{name}/{key}": value for key, value in own.items()}
        if own["questions"]:
            errors.append(own.get("standard_error", np.nan))
    if errors and not np.isnan(errors).any():
        result["val/standard_error"] = mean_error(errors)
    return result


def _of_benchmark(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    verdicts = [[s.value for s in g.scores if s.value is not None] for g in groups]
    means = {i: float(np.mean(own)) for i, own in enumerate(verdicts) if own}
    result = {
        "questions": float(len(means)),
        "no_answer": float(np.mean([not s.matched for g in groups for s in g.scores])),
    }
    if len(means) > 1:
        result["standard_error"] = standard_error(list(means.values()))
    num_samples = max(len(g.rollouts) for g in groups)
    k = 2
    while k <= num_samples:
        if whole := [own for own in verdicts if len(own) >= k]:
            result[f"pass@{k}"] = float(np.mean([pass_at_k(own, k) for own in whole]))
        k *= 2
    if num_samples > 1:
        voted = [
            majority([s.prediction for s in g.scores], [s.value for s in g.scores]) for g in groups
        ]
        if known := [score for score in voted if score is not None]:
            result[f"maj@{num_samples}"] = float(np.mean(known))
    lengths = {i: bucket(groups[i].prompt.num_tokens) for i in means}
    for label in [*BUCKETS, "128K-"]:
        if inside := [means[i] for i, own in lengths.items() if own == label]:
            result[f"score/{label}"] = float(np.mean(inside))
            result[f"questions/{label}"] = float(len(inside))
    return result


def score_lines(metrics: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """Returns a table of the benchmarks `names` in points of 100, with the pass@k of the largest k,
    maj@n, the scores by length, and what stands behind the numbers."""
    width = max(len("benchmark"), *map(len, names)) + 2
    head = f"{'benchmark':<{width}}{'score':>12}{'pass@k':>16}{'maj@n':>16}"
    lines = [head + f"{'questions':>11}{'masked':>8}{'no answer':>11}{'unfinished':>12}{'cut':>6}"]
    for name in names:
        own = {
            key.removeprefix(f"val/{name}/"): value
            for key, value in metrics.items()
            if key.startswith(f"val/{name}/")
        }
        several = "".join(f"{largest(own, kind):>16}" for kind in ("pass@", "maj@"))
        counts = (
            f"{own['questions']:>11g}{own['masked']:>8g}{own['no_answer']:>11.1%}"
            f"{own['unfinished']:>12.1%}{own['cut']:>6g}"
        )
        lines.append(f"{name:<{width}}{_score(own):>12}{several}{counts}")
        buckets = [label for label in [*BUCKETS, "128K-"] if f"score/{label}" in own]
        if len(buckets) > 1:
            by_length = (
                f"{label}: {100 * own[f'score/{label}']:.1f} ({own[f'questions/{label}']:g})"
                for label in buckets
            )
            lines.append("  by tokens of the prompt  " + "  ".join(by_length))
    if len(names) > 1 and "val/score" in metrics:
        whole = {key: metrics.get(f"val/{key}", np.nan) for key in ("score", "standard_error")}
        lines.append(f"{'mean':<{width}}{_score(whole):>12}")
    return lines


def points(score: float, error: float) -> str:
    """Returns a score with its standard error in points of 100, such as "68.0 ± 3.3"."""
    return f"{100 * score:.1f} ± " + ("?" if np.isnan(error) else f"{100 * error:.1f}")


def largest(own: Mapping[str, float], kind: str) -> str:
    """Returns "pass@4 61.2" for the largest k that there is, or "-"."""
    numbers = [int(key.removeprefix(kind)) for key in own if key.startswith(kind)]
    return f"{kind}{max(numbers)} {100 * own[f'{kind}{max(numbers)}']:.1f}" if numbers else "-"


def _score(own: Mapping[str, float]) -> str:
    return points(own["score"], own.get("standard_error", np.nan)) if "score" in own else "-"
