"""Draws the prompts of each batch: new ones of the phase, and hard ones carried from earlier
phases.

draw(phase, n) -> prompts -> (groups) -> observe -> statistics -> later draws
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from megatron_qlrl.config.schema import CurriculumConfig
from megatron_qlrl.curriculum.phase_pool import PhasePool, saved_orders, task_of
from megatron_qlrl.curriculum.retrospective import RetrospectivePool, seen_in
from megatron_qlrl.errors import CheckpointError, DataError
from megatron_qlrl.types import Prompt, ScoredGroup

Source = Literal["new", "carried"]
_COUNTS = ("drawn", "solved", "reached")


class Curriculum:
    """The pools of all phases, and the statistics of all prompts."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        limits: Sequence[int],
        seed: int,
        config: CurriculumConfig,
        solved_above: float = 0.0,
    ) -> None:
        """
        Args:
            prompts: all prompts, with distinct uids.
            limits: the longest prompt of each phase in tokens, in growing order.
            solved_above: the reward above which a response solves its prompt.

        Raises:
            DataError: a phase has no prompt, a prompt no task, or a task no prompt.
        """
        bounds, tasks = [0, *limits], config.tasks
        self._pools = [
            PhasePool(
                prompts,
                phase=k,
                min_tokens=bounds[k],
                max_tokens=bounds[k + 1],
                seed=seed,
                tasks=tasks,
            )
            for k in range(len(limits))
        ]
        self._check_tasks(tasks)
        self.prompts = {uid: p for pool in self._pools for uid, p in pool.prompts.items()}
        self._carried = RetrospectivePool(config, seed=seed, solved_above=solved_above)
        self._solved_above, self._tasks = solved_above, tasks
        self._identity = {
            "seed": seed,
            "limits": list(limits),
            "num_prompts": [len(pool) for pool in self._pools],
        } | ({"tasks": dict(tasks)} if tasks else {})
        self._counts = [
            {source: dict.fromkeys(_COUNTS, 0) for source in ("new", "carried")} for _ in limits
        ]

    def _check_tasks(self, tasks: Mapping[str, float]) -> None:
        unused = [task for task in tasks if not any(task in pool.orders for pool in self._pools)]
        if unused:
            sources = sorted({p.data_source for pool in self._pools for p in pool.prompts.values()})
            raise DataError(
                f"curriculum.tasks: no prompt of any phase is of task {unused[0]!r} (a prompt's "
                "task is the longest name that is a part of its data_source); the data sources are "
                f"{', '.join(sources)}"
            )

    def absent_tasks(self) -> list[str]:
        """Returns a line for each phase that has no prompt of some task."""
        return [
            f"phase {number} has no prompt of {', '.join(absent)} (curriculum.tasks); its other "
            "tasks share the batch"
            for number, pool in enumerate(self._pools)
            if (absent := [task for task in self._tasks if task not in pool.orders])
        ]

    def tasks_of(self, prompts: Sequence[Prompt]) -> list[str]:
        """Returns the task of each prompt, or nothing without `curriculum.tasks`."""
        return [task_of(p.data_source, self._tasks) for p in prompts if self._tasks]

    def pool_size(self, phase: int) -> int:
        """Returns the number of the phase's own prompts."""
        return len(self._pools[phase])

    def source(self, phase: int, uid: str) -> Source:
        """Returns "new" for a prompt of the phase itself, "carried" for one of an earlier phase."""
        return "new" if uid in self._pools[phase].prompts else "carried"

    def draw(
        self, phase: int, n: int, *, max_carried: int = 0, taken: Collection[str] = ()
    ) -> list[Prompt]:
        """Returns at most n prompts, all different and not in `taken`.

        Together with those in `taken`, at most `max_carried` of them are carried. Carried prompts
        are spread evenly between the new ones.
        """
        room = max_carried - sum(self.source(phase, uid) == "carried" for uid in taken)
        earlier = [
            uid for pool in self._pools[:phase] for uid in pool.prompts if uid not in taken
        ]  # fmt: skip
        carried = self._carried.draw(min(room, n), earlier)
        drawn = self._pools[phase].draw(
            n - len(carried), taken, carried=[self.prompts[uid] for uid in carried]
        )
        # Mini-batches are cut in this order, and none of them should hold carried prompts alone.
        places = np.linspace(0, len(drawn), len(carried), endpoint=False).astype(int)
        for place, uid in reversed(list(zip(places, carried, strict=True))):
            drawn.insert(int(place), self.prompts[uid])
        return drawn

    def observe(self, phase: int, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Records every group that was generated, whether it is trained on or not."""
        for group in groups:
            counts = self._counts[phase][self.source(phase, group.prompt.uid)]
            counts["drawn"] += 1
            counts["solved"] += bool((group.rewards > self._solved_above).any())
            self._carried.observe(group, step=step, phase=phase)

    def reached(self, phase: int, groups: Sequence[ScoredGroup]) -> None:
        """Records the groups that are in an optimizer batch."""
        for group in groups:
            self._counts[phase][self.source(phase, group.prompt.uid)]["reached"] += 1

    def metrics(self, phase: int) -> dict[str, float]:
        """Returns size, epoch and mean rewards of the phase's own prompts; and by source, how many
        prompts of the phase were drawn, solved (a response's reward is above `solved_above`) and
        trained on so far."""
        pool = self._pools[phase]
        means = [s.mean for uid, s in self._carried.seen.items() if uid in pool.prompts]
        metrics = {
            "curriculum/phase": float(phase),
            "curriculum/pool_prompts": float(len(pool)),
            "curriculum/epoch": float(pool.epoch),
            "curriculum/seen_prompts": float(len(means)),
        }
        if means:
            metrics["curriculum/seen_rewards/mean"] = float(np.mean(means))
            metrics["curriculum/zero_reward_prompts"] = float(sum(m == 0 for m in means))
        if self._tasks:
            metrics |= {f"curriculum/task/{t}/drawn": float(n) for t, n in pool.drawn.items()}
            metrics |= {
                f"curriculum/task/{t}/epoch": float(o.epoch) for t, o in pool.orders.items()
            }
        for source, counts in self._counts[phase].items():
            metrics |= {f"curriculum/{source}/{name}": float(n) for name, n in counts.items()}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Returns positions in the orders, statistics per prompt, and counts, ready for JSON."""
        return {
            "identity": self._identity,
            "phases": [pool.state_dict() for pool in self._pools],
            "carried": self._carried.state_dict(),
            "counts": [{s: dict(c) for s, c in counts.items()} for counts in self._counts],
        }

    def inherit(self, state: Mapping[str, Any]) -> int:
        """Takes over what another run's `state_dict` says of prompts that are in this run's phases,
        whichever they are. Orders and counts begin anew. Returns the number of prompts."""
        seen = {u: s for u, s in state["carried"]["seen"].items() if u in self.prompts}
        self._carried.inherit(seen)
        return len(seen)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state_dict` was taken.

        Raises:
            CheckpointError: the seed, the prompts, or a phase that has begun are not the same.
        """
        # Phases that have not begun may have been changed since.
        orders = [list(saved_orders(phase).values()) for phase in state["phases"]]
        begun = 1 + max(
            (k for k, own in enumerate(orders) if any(o["epoch"] >= 0 for o in own)), default=-1
        )
        saved = _first_phases(state["identity"], begun)
        known = {uid for pool in self._pools[:begun] for uid in pool.prompts}
        queued = {uid for own in orders[:begun] for order in own for uid in order["queue"]}
        unknown = (queued | seen_in(state["carried"])) - known
        if saved != _first_phases(self._identity, begun) or unknown:
            raise CheckpointError(
                f"the saved data order is for {state['identity']}, this run has {self._identity}"
                + (f", and prompts {sorted(unknown)[:3]} are gone" if unknown else "")
                + "; resume with the same data files, phases and run.seed, or start a new run.dir"
            )
        for number in range(begun):
            self._pools[number].load_state_dict(state["phases"][number])
            counts = state["counts"][number]
            self._counts[number] = {source: dict(c) for source, c in counts.items()}
        self._carried.load_state_dict(state["carried"])


def _first_phases(identity: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {k: v[:count] if isinstance(v, list) else v for k, v in identity.items()}
