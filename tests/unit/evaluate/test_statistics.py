"""Statistics of several samples, against brute force and numbers worked out by hand."""

from collections.abc import Sequence
from itertools import combinations, product
from math import comb, isnan

import numpy as np
import pytest

from megatron_qlrl.evaluate.statistics import (
    bucket,
    majority,
    pass_at_k,
    score_lines,
    standard_error,
    statistics,
)
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup


def group(uid: str, num_tokens: int, samples: Sequence[tuple[str, float | None]]) -> ScoredGroup:
    """Samples are (extracted answer, score)."""
    rollouts = tuple(
        Rollout(uid, i, np.zeros(1, np.int32), np.zeros(1, np.float32), "", True, 0)
        for i in range(len(samples))
    )
    scores = tuple(
        Score(value, value or 0.0, matched="x" if text else "", prediction=text)
        for text, value in samples
    )
    return ScoredGroup(
        Prompt(uid, np.zeros(num_tokens, np.int32), "qa", "?", "!"), rollouts, scores
    )


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(n: int) -> None:
    for scores in [*product([0.0, 1.0], repeat=n), [(i * 0.37) % 1 for i in range(n)]]:
        for k in range(1, n + 1):
            best = [max(subset) for subset in combinations(scores, k)]
            assert pass_at_k(scores, k) == pytest.approx(sum(best) / len(best)), (scores, k)


@pytest.mark.parametrize(("n", "c", "k"), [(16, 3, 2), (16, 0, 8), (64, 1, 64), (200, 7, 100)])
def test_pass_at_k_is_the_formula_of_the_literature(n: int, c: int, k: int) -> None:
    scores = [1.0] * c + [0.0] * (n - c)
    assert pass_at_k(scores, k) == pytest.approx(1 - comb(n - c, k) / comb(n, k))


def test_pass_at_2_of_one_right_in_four_is_a_half() -> None:
    assert pass_at_k([0, 1, 0, 0], 2) == 0.5  # 3 of the 6 pairs hold it
    # The best of the pairs (0.3, 0.7), (0.3, 0.5), (0.7, 0.5).
    assert pass_at_k([0.3, 0.7, 0.5], 2) == pytest.approx((0.7 + 0.5 + 0.7) / 3)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([("Paris", 1), ("Rome", 0), ("the paris.", 1)], 1),
        ([("Rome", 0), ("Paris", 1), ("rome", 0)], 0),
        ([("Paris", 1), ("Rome", 0)], 0.5),  # a tie: the mean of the tied answers
        ([("Rome", 0), ("Oslo", 0), ("Paris", 1)], pytest.approx(1 / 3)),
        ([("", 0), ("", 0), ("Paris", 1)], 1),  # what is empty has no vote
        ([("", 0), ("", 0)], 0),
        ([("5", 1), ("5", 0)], 0.5),  # the judge was of two minds
        ([("5", 0.3), ("5", 0.3), ("6", 0.7)], 0.3),  # partial credit
        ([("5", 0.3), ("6", 0.7)], 0.5),
        ([("5", None), ("5", 1), ("6", 0)], 0.5),  # without a verdict there is no vote: a tie
        ([("5", None), ("5", None), ("6", 0)], 0),
        ([("5", None), ("5", None)], None),
        ([("1,000", 1), ("1000", 1), ("1", 0)], 1),
        ([("?!", 0), ("?!", 0), ("5", 1)], 0),
    ],
)
def test_majority(samples: list[tuple[str, float | None]], expected: float | None) -> None:
    assert majority([a for a, _ in samples], [s for _, s in samples]) == expected


def test_standard_error_of_the_paper_s_noise() -> None:
    assert standard_error([1.0] * 136 + [0.0] * 64) == pytest.approx(0.033, abs=5e-4)
    assert isnan(standard_error([1.0]))


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(0, "0-8K"), (8191, "0-8K"), (8192, "8-16K"), (65535, "32-64K"), (131071, "64-128K"),
     (131072, "128K-")],
)  # fmt: skip
def test_buckets_begin_at_their_lower_bound(tokens: int, name: str) -> None:
    assert bucket(tokens) == name


ANSWERS = {
    "a": [
        group("a:0", 100, [("x", 1), ("x", 1), ("y", 0), ("z", 0)]),  # mean 0.5
        group("a:1", 9000, [("", 0), ("", 0), ("", 0), ("", 0)]),  # 0, and it counts
        group("a:2", 9000, [("x", 1), ("x", 1), ("x", 1), ("y", None)]),  # 1, of three verdicts
        group("a:3", 100, [("y", None)] * 4),  # the judge was away
    ],
    "b": [group("b:0", 100, [("x", 1)] * 4)],
}


def test_statistics_by_hand() -> None:
    result = statistics(ANSWERS)
    assert result == pytest.approx(
        {
            "val/a/questions": 3,
            "val/a/no_answer": 4 / 16,
            "val/a/standard_error": 0.5 / 3**0.5,  # of 0.5, 0, 1: deviation 0.5
            "val/a/pass@2": (5 / 6 + 0 + 1) / 3,  # one pair of six misses both right ones
            "val/a/pass@4": (1 + 0) / 2,  # a:2 has three verdicts only
            "val/a/maj@4": (1 + 0 + 1) / 3,
            "val/a/score/0-8K": 0.5,
            "val/a/questions/0-8K": 1,
            "val/a/score/8-16K": 0.5,
            "val/a/questions/8-16K": 2,
            "val/b/questions": 1,
            "val/b/no_answer": 0,
            "val/b/pass@2": 1,
            "val/b/pass@4": 1,
            "val/b/maj@4": 1,
            "val/b/score/0-8K": 1,
            "val/b/questions/0-8K": 1,
        }
    )


def test_the_error_of_the_mean_adds_up() -> None:
    ab = {"a": ANSWERS["a"], "b": ANSWERS["a"]}
    error = 0.5 / 3**0.5
    assert statistics(ab)["val/standard_error"] == pytest.approx((2 * error**2) ** 0.5 / 2)


def test_one_sample_has_no_pass_at_k() -> None:
    assert set(statistics({"a": [group("a:0", 5, [("x", 1)])]})) == {
        "val/a/questions", "val/a/no_answer", "val/a/score/0-8K", "val/a/questions/0-8K",
    }  # fmt: skip
    assert statistics({}) == {}


def test_the_table_shows_what_stands_behind_the_numbers() -> None:
    others = {"masked": 5, "unfinished": 0.125, "cut": 2}
    metrics = statistics(ANSWERS) | {
        "val/a/score": 0.5, "val/b/score": 1.0, "val/score": 0.75,
        **{f"val/{name}/{key}": value for name in "ab" for key, value in others.items()},
    }  # fmt: skip
    lines = [line.split() for line in score_lines(metrics, ["a", "b"])]
    assert lines[1] == "a 50.0 ± 28.9 pass@4 50.0 maj@4 66.7 3 5 25.0% 12.5% 2".split()
    assert lines[2] == "by tokens of the prompt 0-8K: 50.0 (1) 8-16K: 50.0 (2)".split()
    assert lines[3] == "b 100.0 ± ? pass@4 100.0 maj@4 100.0 1 5 0.0% 12.5% 2".split()
    assert lines[4] == "mean 75.0 ± ?".split()
