"""Difficulty-aware retrospective sampling (QwenLong-L1 section 3.2): hard prompts of earlier
phases are drawn again, with probability proportional to their difficulty.

The paper's difficulty 1 / (mean reward) is infinite for prompts never solved, which are the ones
its authors carry over. Here it is smoothed and capped, min(1 / (mean + eps), cap).
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from megatron_qlrl.config.schema import CurriculumConfig
from megatron_qlrl.types import ScoredGroup


@dataclass(frozen=True)
class Seen:
    """What is known of a prompt: groups with a verdict, mean reward of the newest one, and the
    step and phase of that one. Older means are of other weights and say less."""

    attempts: int
    mean: float
    step: int
    phase: int


class RetrospectivePool:
    """Statistics of every prompt seen, and draws by difficulty that depend on the seed, the
    number of the draw and the statistics alone."""

    def __init__(self, config: CurriculumConfig, *, seed: int) -> None:
        self._config, self._seed = config, seed
        self._draws = 0
        self._seen: dict[str, Seen] = {}

    @property
    def seen(self) -> Mapping[str, Seen]:
        return self._seen

    def observe(self, group: ScoredGroup, *, step: int, phase: int) -> None:
        """Takes in a group's rewards; one without any verdict says nothing and is left out."""
        judged = group.rewards[np.isfinite(group.rewards)]
        if judged.size:
            uid = group.prompt.uid
            attempts = self._seen[uid].attempts + 1 if uid in self._seen else 1
            self._seen[uid] = Seen(attempts, float(judged.mean()), step, phase)

    def weight(self, uid: str) -> float:
        """Difficulty of a prompt that was seen; 0 for one that is not to be carried."""
        mean = self._seen[uid].mean
        if self._config.carry == "unsolved" and mean > 0:
            return 0.0
        return min(1 / (mean + self._config.difficulty_eps), self._config.max_difficulty)

    def draw(self, n: int, candidates: Sequence[str]) -> list[str]:
        """n of the candidates that were seen, one after another with probability proportional to
        their weights and without replacement; fewer when there are not so many."""
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
        """JSON-able; statistics as [attempts, mean, step, phase]."""
        seen = {uid: list(astuple(s)) for uid, s in self._seen.items()}
        return {"draws": self._draws, "seen": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        self._draws = state["draws"]
        self._seen = {uid: Seen(*values) for uid, values in state["seen"].items()}
