"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): batches of groups that carry a gradient.

    groups that waited --> full? --yes--> batch, and what is too much waits (or is dropped)
                            ^  |
           keep <- generate +--no: draw other prompts, at most `generation_rounds` times

It never ends a run: when the rounds or the prompts are used up, the batch is what there is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from megatron_qlrl.config.schema import AlgorithmConfig
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.curriculum.surplus import decode_group, encode_group
from megatron_qlrl.types import Prompt, ScoredGroup


@dataclass(frozen=True)
class Batch:
    """What one step generated and what is made of it.

    Attributes:
        groups: what is trained on; those with `old_logprobs` waited from earlier steps.
        surplus: groups to wait for later steps; to be given to `hold` before the next `fill`.
        generated: every group of this step.
    """

    groups: list[ScoredGroup]
    surplus: list[ScoredGroup]
    generated: list[ScoredGroup]
    metrics: dict[str, float]


class DynamicSampler:
    """Fills batches from a curriculum. Every rank makes the same calls and the same decisions."""

    def __init__(
        self,
        curriculum: Curriculum,
        *,
        config: AlgorithmConfig,
        carried_share: float,
        keep: Callable[[np.ndarray], bool],
        collect: Callable[[Sequence[Prompt], int], list[ScoredGroup]],
        version: Callable[[], int],
        warn: Callable[[str], None],
    ) -> None:
        """
        Args:
            keep: whether a group of these raw rewards ([G], NaN = no verdict) is trained on.
            collect: scored groups of the prompts at a step, with the present weights.
            version: of the present weights.
        """
        self.curriculum = curriculum
        self._config, self._carried_share = config, carried_share
        self._keep, self._collect, self._version, self._warn = keep, collect, version, warn
        self._waiting: list[ScoredGroup] = []
        self._phase = 0

    def fill(self, phase: int, step: int, num_prompts: int) -> Batch:
        """The batch of a step: `num_prompts` groups, or the phase's whole pool if it is smaller."""
        num = min(num_prompts, self.curriculum.pool_size(phase))
        kept = self._fresh_enough(phase)
        num_waited = len(kept)
        generated, rounds = self._rounds(phase, step, num, kept)
        exhausted = self._config.generation_rounds > 1 and len(kept) < num
        skip = exhausted and self._config.incomplete_batch == "skip"
        if exhausted:
            self._warn(
                f"step {step}: {len(kept)} of {num} groups carry a gradient after {rounds} rounds "
                f"({len(generated)} groups generated); "
                + ("no update in this step" if skip else "training on what there is")
            )
        size = 0 if skip else num
        groups, surplus = kept[:size], kept[size:]
        held = surplus if self._config.max_staleness else []
        self.curriculum.reached(phase, groups)
        ages = [self._version() - g.weight_version for g in groups]
        metrics = {
            "batch/rounds": rounds,
            "batch/kept_groups": len(groups),
            "batch/filtered_groups": len(generated) + num_waited - len(kept),
            "batch/expired_groups": len(self._waiting) - num_waited,
            "batch/held_groups": len(held),
            "batch/dropped_groups": len(surplus) - len(held),
            "batch/exhausted": exhausted,
            "batch/staleness/max": max(ages, default=0),
            "batch/staleness/mean": float(np.mean(ages)) if ages else 0.0,
        }
        self._phase, self._waiting = phase, []
        return Batch(groups, held, generated, {k: float(v) for k, v in metrics.items()})

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

    def _fresh_enough(self, phase: int) -> list[ScoredGroup]:
        """Groups that waited and may be used: of this phase, and of weights not too old."""
        oldest = self._version() - self._config.max_staleness
        return [g for g in self._waiting if phase == self._phase and g.weight_version >= oldest]

    def _rounds(
        self, phase: int, step: int, num: int, kept: list[ScoredGroup]
    ) -> tuple[list[ScoredGroup], int]:
        """Extends `kept` to `num` groups or more; all groups generated, and in how many rounds.

        A prompt is generated once a step: the seeds of its responses would be the same again.
        """
        generated: list[ScoredGroup] = []
        # What is a whole number on paper must not lose one to rounding.
        max_carried = int(self._carried_share * num + 1e-9)
        waiting = {g.prompt.uid for g in kept}
        for done in range(self._config.generation_rounds):
            missing = num - len(kept)
            prompts = self.curriculum.draw(
                phase,
                ceil(max(missing, 0) * self._config.oversampling - 1e-9),
                max_carried=max_carried,
                taken=waiting | {g.prompt.uid for g in generated},
            )
            if not prompts:
                return generated, done
            groups = self._collect(prompts, step)
            self.curriculum.observe(phase, step, groups)
            generated += groups
            kept += [g for g in groups if self._keep(g.rewards)]
        return generated, self._config.generation_rounds
