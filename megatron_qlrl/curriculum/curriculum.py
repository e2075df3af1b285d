"""What each batch is made of: new prompts of the phase and hard ones carried from earlier phases.

draw(phase, n) -> prompts -> (groups) -> observe -> statistics -> later draws
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from megatron_qlrl.config.schema import CurriculumConfig
from megatron_qlrl.curriculum.phases import PhaseSampler
from megatron_qlrl.curriculum.retrospective import RetrospectivePool
from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.types import Prompt, ScoredGroup

Source = Literal["new", "carried"]
_COUNTS = ("drawn", "solved", "reached")


class Curriculum:
    """The samplers of all phases with one set of statistics."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        limits: Sequence[int],
        seed: int,
        config: CurriculumConfig,
    ) -> None:
        """
        Args:
            prompts: all prompts, with distinct uids.
            limits: the phases' longest prompts in tokens, growing.

        Raises:
            DataError: a phase has no prompt.
        """
        bounds = [0, *limits]
        self._phases = [
            PhaseSampler(
                prompts, phase=k, min_tokens=bounds[k], max_tokens=bounds[k + 1], seed=seed
            )
            for k in range(len(limits))
        ]
        self.prompts = {uid: p for sampler in self._phases for uid, p in sampler.pool.items()}
        self._carried = RetrospectivePool(config, seed=seed)
        self._identity = {
            "seed": seed,
            "limits": list(limits),
            "num_prompts": [len(sampler) for sampler in self._phases],
        }
        self._counts = [
            {source: dict.fromkeys(_COUNTS, 0) for source in ("new", "carried")} for _ in limits
        ]

    def pool_size(self, phase: int) -> int:
        """Number of the phase's own prompts."""
        return len(self._phases[phase])

    def source(self, phase: int, uid: str) -> Source:
        """Whether a prompt is the phase's own or carried from an earlier one."""
        return "new" if uid in self._phases[phase].pool else "carried"

    def draw(
        self, phase: int, n: int, *, max_carried: int = 0, taken: Collection[str] = ()
    ) -> list[Prompt]:
        """At most n prompts, all different and none of `taken`. At most `max_carried` carried ones
        are among them, those of `taken` counted in; they lie spread between the new ones."""
        room = max_carried - sum(self.source(phase, uid) == "carried" for uid in taken)
        earlier = [
            uid for s in self._phases[:phase] for uid in s.pool if uid not in taken
        ]  # fmt: skip
        carried = self._carried.draw(min(room, n), earlier)
        drawn = self._phases[phase].draw(n - len(carried), taken)
        # Mini-batches are cut in order: one of carried prompts alone would be a step of its own.
        places = np.linspace(0, len(drawn), len(carried), endpoint=False).astype(int)
        for place, uid in reversed(list(zip(places, carried, strict=True))):
            drawn.insert(int(place), self.prompts[uid])
        return drawn

    def observe(self, phase: int, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Takes in every group that was generated, whether it is trained on or not."""
        for group in groups:
            counts = self._counts[phase][self.source(phase, group.prompt.uid)]
            counts["drawn"] += 1
            counts["solved"] += bool(np.nansum(group.rewards) > 0)
            self._carried.observe(group, step=step, phase=phase)

    def reached(self, phase: int, groups: Sequence[ScoredGroup]) -> None:
        """Takes in the groups that an optimizer batch is made of."""
        for group in groups:
            self._counts[phase][self.source(phase, group.prompt.uid)]["reached"] += 1

    def metrics(self, phase: int) -> dict[str, float]:
        """Pool, epoch and difficulty of the phase's own prompts; and since the phase began the
        prompts drawn, solved (a response got a reward) and in optimizer batches, by source."""
        sampler = self._phases[phase]
        means = [s.mean for uid, s in self._carried.seen.items() if uid in sampler.pool]
        found = {
            "curriculum/phase": float(phase),
            "curriculum/pool_prompts": float(len(sampler)),
            "curriculum/epoch": float(sampler.epoch),
            "curriculum/seen_prompts": float(len(means)),
        }
        if means:
            found["curriculum/seen_rewards/mean"] = float(np.mean(means))
            found["curriculum/zero_reward_prompts"] = float(sum(m == 0 for m in means))
        for source, counts in self._counts[phase].items():
            found |= {f"curriculum/{source}/{name}": float(n) for name, n in counts.items()}
        return found

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: positions in the orders, statistics per prompt, counts."""
        return {
            "identity": self._identity,
            "phases": [sampler.state_dict() for sampler in self._phases],
            "carried": self._carried.state_dict(),
            "counts": [{s: dict(c) for s, c in counts.items()} for counts in self._counts],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken.

        Raises:
            CheckpointError: the state belongs to another seed, or other phases that have begun,
                or other prompts.
        """
        # Phases that have not begun may be others by now.
        begun = 1 + max((k for k, p in enumerate(state["phases"]) if p["epoch"] >= 0), default=-1)
        saved = _of_begun(state["identity"], begun)
        known = {uid for sampler in self._phases[:begun] for uid in sampler.pool}
        queued = {uid for phase in state["phases"][:begun] for uid in phase["queue"]}
        unknown = (queued | state["carried"]["seen"].keys()) - known
        if saved != _of_begun(self._identity, begun) or unknown:
            raise CheckpointError(
                f"the saved data order is for {state['identity']}, this run has {self._identity}"
                + (f", and prompts {sorted(unknown)[:3]} are gone" if unknown else "")
                + "; resume with the same data files, phases and run.seed, or start a new run.dir"
            )
        for number in range(begun):
            self._phases[number].load_state_dict(state["phases"][number])
            counts = state["counts"][number]
            self._counts[number] = {source: dict(c) for source, c in counts.items()}
        self._carried.load_state_dict(state["carried"])


def _of_begun(identity: Mapping[str, Any], begun: int) -> dict[str, Any]:
    return {k: v[:begun] if isinstance(v, list) else v for k, v in identity.items()}
