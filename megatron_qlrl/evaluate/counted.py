"""Counts the answers of an evaluation as they come."""

from megatron_qlrl.platform.progress import Tally
from megatron_qlrl.rollout.collect import Answers
from megatron_qlrl.types import Prompt, Rollout


class CountedAnswers:
    """Implements `rollout.collect.Answers` around `kept`, or around nothing.

    The tally is that of this rank's engine, which stands for the others: prompts are shared out
    evenly among them.
    """

    def __init__(self, kept: Answers | None, tally: Tally) -> None:
        self._kept, self._tally = kept, tally

    def known(self, prompt: Prompt, sample: int) -> Rollout | None:
        rollout = None if self._kept is None else self._kept.known(prompt, sample)
        self._tally.total += 1  # the collector asks once for each answer that it wants
        self._tally.known += rollout is not None
        return rollout

    def add(self, prompt: Prompt, rollout: Rollout) -> None:
        self._tally.done += 1
        if self._kept is not None:
            self._kept.add(prompt, rollout)
