"""Answers are counted, and kept where something keeps them."""

import numpy as np

from megatron_qlrl.evaluate.counted import CountedAnswers
from megatron_qlrl.platform.progress import Tally
from megatron_qlrl.types import Prompt, Rollout

PROMPT = Prompt("a:0", np.zeros(1, np.int32), "musique", "?", "!")
ROLLOUT = Rollout("a:0", 0, np.zeros(1, np.int32), np.zeros(1, np.float32), "", True, 0)


class Kept:
    def __init__(self) -> None:
        self.added: list[Rollout] = []

    def known(self, prompt: Prompt, sample: int) -> Rollout | None:
        return ROLLOUT if sample == 0 else None

    def add(self, prompt: Prompt, rollout: Rollout) -> None:
        self.added.append(rollout)


def test_known_and_new_answers_are_counted() -> None:
    kept, tally = Kept(), Tally("answers", clock=lambda: 0.0)
    answers = CountedAnswers(kept, tally)
    assert [answers.known(PROMPT, sample) for sample in range(3)] == [ROLLOUT, None, None]
    answers.add(PROMPT, ROLLOUT)
    assert (tally.total, tally.known, tally.done) == (3, 1, 1)
    assert kept.added == [ROLLOUT]


def test_without_anything_that_keeps_them() -> None:
    tally = Tally("answers")
    answers = CountedAnswers(None, tally)
    assert answers.known(PROMPT, 0) is None
    answers.add(PROMPT, ROLLOUT)
    assert (tally.total, tally.known, tally.done) == (1, 0, 1)
