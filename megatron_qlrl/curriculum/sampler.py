"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): batches of groups that carry a gradient.

    begin -> draw -> (generate) -> observe --+
              ^                              |   until the batch is full, or the rounds or the
              +------------------------------+   prompts are used up
    take: the batch, and the surplus that waits for later steps (or is dropped)

It never ends a run: when the rounds or the prompts are used up, the batch is what there is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np

from megatron_qlrl.config.schema import AlgorithmConfig
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.curriculum.waiting import decode_group, encode_group
from megatron_qlrl.types import Prompt, ScoredGroup


@dataclass(frozen=True)
class Batch:
    """The groups of one step.

    Attributes:
        groups: what is trained on; those with `old_logprobs` waited from earlier steps.
        surplus: groups that wait for later steps; `hold` takes them before the next `begin`.
        generated: every group of this step.
    """

    groups: list[ScoredGroup]
    surplus: list[ScoredGroup]
    generated: list[ScoredGroup]
    metrics: dict[str, float]


@dataclass
class _Step:
    """The step that is being filled; `kept` grows from the groups that waited."""

    phase: int
    number: int
    version: int
    size: int
    kept: list[ScoredGroup]
    num_waited: int
    generated: list[ScoredGroup] = field(default_factory=list[ScoredGroup])
    rounds: int = 0


class Sampler:
    """Fills batches from a curriculum. Every rank makes the same calls and the same decisions."""

    def __init__(
        self,
        curriculum: Curriculum,
        *,
        config: AlgorithmConfig,
        prompts_per_step: int,
        carried_share: float,
        keep: Callable[[np.ndarray], bool],
        warn: Callable[[str], None],
    ) -> None:
        """`keep` decides whether a group of these raw rewards ([G], NaN = no verdict) is trained
        on."""
        self.curriculum = curriculum
        self._config, self._prompts_per_step = config, prompts_per_step
        self._carried_share, self._keep, self._warn = carried_share, keep, warn
        self._waiting: list[ScoredGroup] = []
        self._phase = 0
        self._step: _Step | None = None

    def begin(self, phase: int, step: int, *, version: int) -> None:
        """Begins the batch of a step with weights of `version`: `prompts_per_step` groups, or the
        phase's whole pool if it is smaller. Groups that waited come first, unless they are of an
        earlier phase or of weights that are too old."""
        oldest = version - self._config.max_staleness
        kept = [g for g in self._waiting if phase == self._phase and g.weight_version >= oldest]
        size = min(self._prompts_per_step, self.curriculum.pool_size(phase))
        self._step = _Step(phase, step, version, size, kept, len(kept))

    def draw(self) -> list[Prompt]:
        """The prompts of the next round; none when the step is over.

        A prompt is drawn once in a step, because its responses would get the same seeds again.
        """
        now = self._open_step
        if now.rounds == self._config.generation_rounds:
            return []
        missing = max(now.size - len(now.kept), 0)
        # The epsilons keep rounding from changing what is a whole number on paper.
        prompts = self.curriculum.draw(
            now.phase,
            ceil(missing * self._config.oversampling - 1e-9),
            max_carried=int(self._carried_share * now.size + 1e-9),
            taken={g.prompt.uid for g in (*now.kept, *now.generated)},
        )
        now.rounds += bool(prompts)
        return prompts

    def observe(self, groups: Sequence[ScoredGroup]) -> None:
        """Takes in the groups of the prompts that `draw` gave."""
        now = self._open_step
        self.curriculum.observe(now.phase, now.number, groups)
        now.generated += groups
        now.kept += [g for g in groups if self._keep(g.rewards)]

    def take(self) -> Batch:
        """Ends the step: its batch, with at most `size` groups."""
        now = self._open_step
        exhausted = self._config.generation_rounds > 1 and len(now.kept) < now.size
        skip = exhausted and self._config.incomplete_batch == "skip"
        if exhausted:
            self._warn(
                f"step {now.number}: {len(now.kept)} of {now.size} groups carry a gradient after "
                f"{now.rounds} rounds ({len(now.generated)} groups generated); "
                + ("no update in this step" if skip else "training on what there is")
            )
        size = 0 if skip else now.size
        groups, surplus = now.kept[:size], now.kept[size:]
        held = surplus if self._config.max_staleness else []
        self.curriculum.reached(now.phase, groups)
        ages = [now.version - g.weight_version for g in groups]
        metrics = {
            "batch/rounds": now.rounds,
            "batch/kept_groups": len(groups),
            "batch/filtered_groups": len(now.generated) + now.num_waited - len(now.kept),
            "batch/expired_groups": len(self._waiting) - now.num_waited,
            "batch/held_groups": len(held),
            "batch/dropped_groups": len(surplus) - len(held),
            "batch/exhausted": exhausted,
            "batch/staleness/max": max(ages, default=0),
            "batch/staleness/mean": float(np.mean(ages)) if ages else 0.0,
        }
        self._phase, self._waiting, self._step = now.phase, [], None
        return Batch(groups, held, now.generated, {k: float(v) for k, v in metrics.items()})

    def hold(self, surplus: Sequence[ScoredGroup]) -> None:
        """Keeps a batch's surplus, with its old log-probs, for the next steps."""
        assert all(g.old_logprobs is not None for g in surplus)
        self._waiting = list(surplus)

    def release(self) -> None:
        """Drops what waits: the run went back to before the weights that sampled it."""
        self._waiting = []

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the curriculum, and every group that waits."""
        waiting = [encode_group(group) for group in self._waiting]
        return {
            "curriculum": self.curriculum.state_dict(),
            "phase": self._phase,
            "waiting": waiting,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken; raises as `Curriculum.load_state_dict`."""
        self.curriculum.load_state_dict(state["curriculum"])
        prompts = self.curriculum.prompts
        self._phase = state["phase"]
        self._waiting = [decode_group(saved, prompts) for saved in state["waiting"]]

    @property
    def _open_step(self) -> _Step:
        assert self._step is not None, "begin() was not called"
        return self._step
