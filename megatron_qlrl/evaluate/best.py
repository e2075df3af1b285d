"""Which step of a run scored best on the held-out files, and whether it is worth going on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class HeldOutScore:
    """`val/score` after a step.

    Attributes:
        name: of the evaluation, as in <run.dir>/eval/<name>.json.
        error: its standard error over questions, or None where it has none (one question).
    """

    steps_done: int
    name: str
    score: float
    error: float | None

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.4f}"
        return f"{self.score:.4f}{error} after {self.steps_done} steps"


class BestScore:
    """The best and the last score of a run; of equal ones the newer is the best, since it has seen
    more data. The starting weights do not count: a run has no checkpoint of them.

    Attributes:
        best, last: None before the first evaluation.
    """

    def __init__(self, patience: int | None) -> None:
        """`patience`: after how many evaluations in a row that are not the best so far the run has
        nothing to gain; None: never."""
        self._patience = patience
        self._without_gain = 0
        self.best: HeldOutScore | None = None
        self.last: HeldOutScore | None = None

    def observe(self, score: HeldOutScore) -> None:
        """Takes the score of an evaluation after those before it."""
        self.last = score
        if self.best is None or score.score >= self.best.score:
            self.best, self._without_gain = score, 0
        else:
            self._without_gain += 1

    @property
    def exhausted(self) -> bool:
        return self._patience is not None and self._without_gain >= self._patience

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best and asdict(self.best),
            "last": self.last and asdict(self.last),
            "without_gain": self._without_gain,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = state["best"] and HeldOutScore(**state["best"])
        self.last = state["last"] and HeldOutScore(**state["last"])
        self._without_gain = state["without_gain"]
