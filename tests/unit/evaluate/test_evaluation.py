"""When the held-out files are scored, and what is kept of it; the answers are given."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_qlrl.config.schema import EvaluationConfig
from megatron_qlrl.errors import StopRequested
from megatron_qlrl.evaluate.evaluation import Evaluation
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.platform.progress import Progress
from megatron_qlrl.rollout.vllm_engine import Sampling
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup

PROMPT = Prompt("held:0", np.zeros(2, np.int32), "musique", "?", "!")


class FakeCollector:
    """Answers with a right and a wrong response, or is told to stop."""

    stopped = False

    @contextmanager
    def session(
        self, sampling: Sampling, *, step: int, meter: Meter, answers: Any = None
    ) -> Iterator[Any]:
        assert (sampling.max_tokens, step) == (7, -1)
        yield self.collect
        meter.update({"reward/judge/asked": 3.0, "perf/decode_tokens_per_s": 9.0})

    def collect(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        if self.stopped:
            raise StopRequested("asked to stop")
        rollouts = tuple(
            Rollout(PROMPT.uid, n, np.array([5, n], np.int32), np.zeros(2, np.float32), "", True, 0)
            for n in range(2)
        )
        return [ScoredGroup(p, rollouts, (Score(1.0, 1.0), Score(0.0, 0.0))) for p in prompts]


class FakeTracker:
    def __init__(self) -> None:
        self.logged: list[tuple[int, float]] = []
        self.warnings: list[str] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        assert metrics["timing_s/testing"] > 0
        assert metrics["val/reward/judge/asked"] == 3
        self.logged.append((step, metrics["val/held/score"]))


Make = Callable[..., tuple[Evaluation, FakeCollector, FakeTracker]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make_evaluation(**settings: Any) -> tuple[Evaluation, FakeCollector, FakeTracker]:
        collector, tracker = FakeCollector(), FakeTracker()
        made = Evaluation(
            EvaluationConfig.model_validate(settings),
            {"held": [PROMPT]},
            collector=collector,  # pyright: ignore
            max_response_tokens=7,
            folder=tmp_path / "eval",
            write=lambda w: w(tracker),  # pyright: ignore
            warn=tracker.warnings.append,
            progress=Progress(lambda _: None),
        )
        return made, collector, tracker

    return make_evaluation


def train(made: Evaluation, first: int, end: int, state: Any) -> None:
    """Steps [first, end) of a phase that ends there."""
    if not state:
        made.before_training()
    if first:
        made.after(first, "p", last=first == end)
    for step in range(first, end):
        made.after(step + 1, "p", last=step + 1 == end)


def test_a_score_of_answers_that_cannot_be_read_is_said(make: Make) -> None:
    made, _, tracker = make()
    made.score("start", 0)
    (warning,) = tracker.warnings
    assert warning.startswith("evaluation 'start': 2 of 2 responses have no readable answer")


@pytest.mark.parametrize(
    ("settings", "steps", "names"),
    [
        ({"before_training": True, "every_steps": 2}, [0, 1, 3], ["p", "start", "step_2"]),
        ({"before_training": False}, [3], ["p"]),
        ({"at_phase_end": False, "every_steps": 2}, [1, 3], ["step_2", "step_4"]),
        ({"at_phase_end": False}, [], []),
    ],
)
def test_turns(
    make: Make, settings: dict[str, Any], steps: list[int], names: list[str], tmp_path: Path
) -> None:
    made, _, tracker = make(**{"before_training": False} | settings)
    train(made, 0, 4, {})
    assert tracker.logged == [(step, 0.5) for step in steps]
    assert sorted(p.stem for p in tmp_path.glob("eval/*.json")) == names


def test_scores_and_answers_are_written(make: Make, tmp_path: Path) -> None:
    made, _, _ = make(before_training=True, every_steps=1)
    train(made, 0, 2, {})
    for name in ("start", "step_1", "p"):
        scores = json.loads((tmp_path / "eval" / f"{name}.json").read_text())
        assert scores["val/held/score"] == scores["val/score"] == 0.5
    answers = [json.loads(line) for line in (tmp_path / "eval" / "p.jsonl").open()]
    assert [(a["uid"], a["score"], a["token_ids"]) for a in answers] == [
        ("held:0", 1.0, [5, 0]),
        ("held:0", 0.0, [5, 1]),
    ]


@pytest.mark.parametrize(("every", "ended"), [(2, 2), (None, 4)])
def test_evaluation_that_was_given_up_is_made_up_for(
    make: Make, every: int | None, ended: int
) -> None:
    made, collector, tracker = make(before_training=False, every_steps=every)
    collector.stopped = True
    with pytest.raises(StopRequested):
        train(made, 0, 4, {})
    state = json.loads(json.dumps(made.state_dict()))

    again, _, tracker = make(before_training=True, every_steps=every)
    again.load_state_dict(state)
    train(again, ended, 4, {"step": ended})
    assert [step for step, _ in tracker.logged] == ([1, 3] if every else [3])


def test_evaluation_that_was_made_is_not_made_again(make: Make) -> None:
    made, _, _ = make(before_training=False, every_steps=2)
    train(made, 0, 4, {})
    again, _, tracker = make(before_training=True, every_steps=2)
    again.load_state_dict(made.state_dict())
    train(again, 4, 4, {"step": 4})
    assert tracker.logged == []
