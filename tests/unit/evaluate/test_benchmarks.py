"""Held-out scores by hand."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from megatron_qlrl.data.cut import Limits
from megatron_qlrl.evaluate.benchmarks import benchmark_scores, cut_report
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup


def prompt(uid: str) -> Prompt:
    return Prompt(uid, np.zeros(2, np.int32), "docqa", "?", "!")


def group(of: Prompt, samples: Sequence[tuple[float | None, int, bool]]) -> ScoredGroup:
    """Samples are (score, response tokens, finished)."""
    rollouts = tuple(
        Rollout(of.uid, i, np.zeros(n, np.int32), np.zeros(n, np.float32), "", finished, 0)
        for i, (_, n, finished) in enumerate(samples)
    )
    return ScoredGroup(of, rollouts, tuple(Score(value, value or 0.0) for value, _, _ in samples))


ANSWERS = {
    "a:0": [(1.0, 4, True), (0.0, 2, True)],
    "a:1": [(1.0, 6, False), (1.0, 4, True)],
    "b:0": [(0.0, 1, True), (None, 3, False)],  # no verdict: left out of the score
}


def answers(*uids: str) -> list[ScoredGroup]:
    return [group(prompt(uid), ANSWERS[uid]) for uid in uids]


def test_mean_over_samples_then_prompts_then_benchmarks() -> None:
    metrics = benchmark_scores({"a": answers("a:0", "a:1"), "b": answers("b:0")})
    assert metrics == pytest.approx(
        {
            "val/a/score": 0.75,
            "val/a/cut": 0.0,
            "val/a/masked": 0.0,
            "val/a/response_length": 4.0,
            "val/a/unfinished": 0.25,
            "val/b/score": 0.0,
            "val/b/cut": 0.0,
            "val/b/masked": 1.0,
            "val/b/response_length": 2.0,
            "val/b/unfinished": 0.5,
            "val/score": 0.375,
        }
    )


def test_nothing_to_evaluate() -> None:
    assert benchmark_scores({}) == {}


def test_a_prompt_without_any_verdict_is_left_out_and_counted() -> None:
    groups = [group(prompt("a:0"), [(1.0, 1, True)]), group(prompt("a:1"), [(None, 1, True)] * 2)]
    metrics = benchmark_scores({"a": groups})
    assert (metrics["val/a/score"], metrics["val/a/masked"]) == (1.0, 2.0)


def test_a_benchmark_without_any_verdict_has_no_score() -> None:
    metrics = benchmark_scores(
        {
            "a": [group(prompt("a:0"), [(None, 1, True)])],
            "b": [group(prompt("b:0"), [(0.5, 1, True)])],
        }
    )
    assert "val/a/score" not in metrics
    assert (metrics["val/a/masked"], metrics["val/score"]) == (1.0, 0.5)


def test_cut_prompts_are_counted_by_benchmark() -> None:
    long = replace(prompt("a:1"), cut=True)
    benchmarks = {"a": [prompt("a:0"), long], "b": [prompt("b:0")]}
    assert cut_report(benchmarks, Limits(100, 60)) == (
        "1 of 3 evaluation prompts lose their middle (a: 1): the text has more than "
        "evaluation.max_input_tokens=100, or the prompt more than the 60 tokens that are left "
        "beside a response"
    )
    assert cut_report(benchmarks, Limits(100, 1124)).endswith("max_input_tokens=100")
    assert cut_report({"b": [prompt("b:0")]}, Limits(100, 60)) == ""
    metrics = benchmark_scores({"a": [group(p, [(1.0, 1, True)]) for p in benchmarks["a"]]})
    assert metrics["val/a/cut"] == 1.0
