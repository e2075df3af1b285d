"""Difficulty-aware retrospective sampling (QwenLong-L1 section 3.2): hard prompts of earlier
phases are drawn again, with probability proportional to their difficulty.

The paper's difficulty 1 / (mean reward) is infinite for prompts that were never solved, which are
the ones its authors carry over. Here it is smoothed and capped: min(1 / (mean + eps), cap).
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from megatron_qlrl.config.schema import CurriculumConfig
from megatron_qlrl.types import ScoredGroup

BEFORE = -1
"""Step and phase of statistics that a run has from its parent."""


@dataclass(frozen=True)
class Seen:
    """Statistics of one prompt.

    Attributes:
        attempts: groups with at least one verdict.
        mean: mean reward of the newest of them; older ones come from older weights and say less.
        step, phase: when the newest of them was generated, or `BEFORE`.
        best: the newest one's highest reward.
    """

    attempts: int
    mean: float
    step: int
    phase: int
    best: float


class RetrospectivePool:
    """Keeps statistics of every prompt seen, and draws prompts by difficulty. A draw depends on the
    seed, the number of the draw and the statistics alone."""

    def __init__(self, config: CurriculumConfig, *, seed: int, solved_above: float = 0.0) -> None:
        """`solved_above` is the reward above which a response solves its prompt."""
        self._config, self._seed, self._solved_above = config, seed, solved_above
        self._draws = 0
        self._seen: dict[str, Seen] = {}

    @property
    def seen(self) -> Mapping[str, Seen]:
        return self._seen

    def observe(self, group: ScoredGroup, *, step: int, phase: int) -> None:
        """Records a group's rewards; a group without any verdict is left out."""
        judged = group.rewards[np.isfinite(group.rewards)]
        if judged.size:
            uid = group.prompt.uid
            attempts = self._seen[uid].attempts + 1 if uid in self._seen else 1
            mean, best = float(judged.mean()), float(judged.max())
            self._seen[uid] = Seen(attempts, mean, step, phase, best)

    def inherit(self, saved: Mapping[str, Sequence[float]]) -> None:
        """Takes over statistics by uid from another run's `state_dict`."""
        for uid, values in saved.items():
            self._seen[uid] = replace(_seen(values), step=BEFORE, phase=BEFORE)

    def weight(self, uid: str) -> float:
        """Returns the difficulty of a prompt that was seen, or 0 if it must not be carried."""
        seen = self._seen[uid]
        if self._config.carry == "unsolved" and seen.best > self._solved_above:
            return 0.0
        return min(1 / (seen.mean + self._config.difficulty_eps), self._config.max_difficulty)

    def draw(self, n: int, candidates: Sequence[str]) -> list[str]:
        """Returns n of the candidates that were seen, or fewer if there are fewer. They are drawn
        one after another without replacement, with probability proportional to their weights."""
        weights = {u: w for u in candidates if u in self._seen and (w := self.weight(u)) > 0}
        if n <= 0 or not weights:
            return []
        self._draws += 1
        # Gumbel top-k is successive sampling without replacement (arXiv 1903.06059).
        noise = np.random.default_rng([self._seed, self._draws]).gumbel(size=len(weights))
        keys = np.log(list(weights.values())) + noise
        order = np.argsort(-keys, kind="stable")[:n]
        uids = list(weights)
        return [uids[i] for i in order]

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of draws and each prompt's statistics, ready for JSON."""
        seen = {uid: list(astuple(s)) for uid, s in self._seen.items()}
        return {"draws": self._draws, "seen": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state_dict` was taken."""
        self._draws = state["draws"]
        self._seen = {uid: _seen(values) for uid, values in state["seen"].items()}


def seen_in(state: Mapping[str, Any]) -> set[str]:
    """Returns the uids of the prompts that the run whose `state_dict` this is has seen itself."""
    return {uid for uid, values in state["seen"].items() if _seen(values).phase != BEFORE}


def _seen(values: Sequence[Any]) -> Seen:
    # Older checkpoints have no best; their mean is above 0 exactly where it is.
    return Seen(*(*values, values[1])[:5])
