"""The prompts of one curriculum phase, drawn in a fixed order and, where tasks are named, in given
shares of them (task-balanced sampling: QwenLong-L1.5, arXiv 2512.12967)."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from megatron_qlrl.curriculum.shuffled import Shuffled
from megatron_qlrl.errors import DataError
from megatron_qlrl.types import Prompt

ANY_TASK: Mapping[str, float] = {"*": 1.0}
"""What stands for tasks where there are none."""


class PhasePool:
    """Draws the prompts of phase k, min_tokens < tokens <= max_tokens (QwenLong-L1 section 3.1).

    The order is that of `Shuffled`. With tasks each task has an order of its own, and each prompt
    is of the task that is furthest behind its share of all that was drawn in the phase. A task
    whose prompts are all taken in a step leaves its place to the others, and catches up later.

    Attributes:
        prompts: of the phase, by uid.
        orders: of each task that has prompts; without tasks there is one, "*".
        drawn: how many prompts of each task were drawn.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        phase: int,
        min_tokens: int,
        max_tokens: int,
        seed: int,
        tasks: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            prompts: all prompts, with distinct uids; those of other lengths are left out.
            phase: index of the phase, part of the seed of the order.
            min_tokens, max_tokens: half-open range of prompt lengths, (min_tokens, max_tokens].
            tasks: the share of each (`curriculum.tasks`). Tasks without a prompt in this phase are
                left out.

        Raises:
            DataError: no prompt has such a length, or a prompt is of no task.
        """
        assert len({p.uid for p in prompts}) == len(prompts), "prompt uids are not distinct"
        self.prompts = {p.uid: p for p in prompts if min_tokens < p.num_tokens <= max_tokens}
        if not self.prompts:
            raise DataError(_empty_pool(prompts, phase, min_tokens, max_tokens))
        # In sorted order: a file of settings may have passed through a program that sorts names.
        self._tasks = dict(sorted(tasks.items())) if tasks else ANY_TASK
        members: dict[str, list[str]] = {task: [] for task in self._tasks}
        for prompt in self.prompts.values():
            members[task_of(prompt.data_source, self._tasks)].append(prompt.uid)
        self.orders = {
            # An order of all prompts has the key that it had before there were tasks.
            task: Shuffled(uids, key=(seed, phase, number) if tasks else (seed, phase))
            for number, (task, uids) in enumerate(members.items())
            if uids
        }
        self.drawn = dict.fromkeys(self.orders, 0)

    def __len__(self) -> int:
        """Number of prompts in the pool."""
        return len(self.prompts)

    @property
    def epoch(self) -> int:
        """The epoch of the newest prompt drawn, of the task that is furthest; 0 before the first
        draw."""
        return max(order.epoch for order in self.orders.values())

    def draw(
        self, n: int, taken: Collection[str] = (), carried: Collection[Prompt] = ()
    ) -> list[Prompt]:
        """Returns the next n prompts, all different and not in `taken`, or fewer if the pool has
        fewer. `carried` are prompts of earlier phases that the batch gets, too; they count in the
        shares of their tasks."""
        for prompt in carried:
            task = task_of(prompt.data_source, self._tasks)
            if task in self.drawn:
                self.drawn[task] += 1
        turns = self._turns(n, {task: order.left(taken) for task, order in self.orders.items()})
        uids = {t: iter(order.draw(turns.count(t), taken)) for t, order in self.orders.items()}
        return [self.prompts[next(uids[task])] for task in turns]

    def _turns(self, n: int, left: dict[str, int]) -> list[str]:
        """Returns the tasks of the next n prompts, or fewer if there are fewer `left`."""
        whole = sum(self._tasks[task] for task in self.orders)
        turns: list[str] = []
        for _ in range(min(n, sum(left.values()))):
            due = sum(self.drawn.values()) + 1
            behind = {
                task: self._tasks[task] / whole * due - drawn
                for task, drawn in self.drawn.items()
                if left[task]
            }
            task = max(behind, key=lambda task: behind[task])
            left[task] -= 1
            self.drawn[task] += 1
            turns.append(task)
        return turns

    def state_dict(self) -> dict[str, Any]:
        """Returns the positions in the orders, ready for JSON."""
        if self._tasks is ANY_TASK:
            return self.orders["*"].state_dict()
        orders = {task: order.state_dict() for task, order in self.orders.items()}
        return {"orders": orders, "drawn": dict(self.drawn)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state_dict` was taken, with the same prompts, seed and tasks."""
        for task, saved in saved_orders(state).items():
            self.orders[task].load_state_dict(saved)
        self.drawn = dict(state.get("drawn", self.drawn))


def saved_orders(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the states of a pool's orders by task, from the pool's `state_dict`."""
    return state.get("orders", {"*": state})


def task_of(data_source: str, tasks: Collection[str]) -> str:
    """Returns the task of a data source: the longest name that is a part of its name, in any case,
    or else "*", if that is one of the names.

    Raises:
        DataError: it has none.
    """
    parts = [task for task in tasks if task.lower() in data_source.lower()]
    task = max(parts, key=len) if parts else "*"
    if task not in tasks:
        raise DataError(
            f"data_source {data_source!r} belongs to no task: curriculum.tasks names "
            f"{', '.join(tasks)}; add a part of its name, or *, which takes all others"
        )
    return task


def _empty_pool(prompts: Sequence[Prompt], phase: int, min_tokens: int, max_tokens: int) -> str:
    lengths = [p.num_tokens for p in prompts]
    seen = f"{min(lengths)} to {max(lengths)} tokens" if lengths else "no prompts at all"
    return (
        f"phase {phase} trains on prompts of {min_tokens} < tokens <= {max_tokens}, and none of "
        f"the {len(lengths)} prompts is that long (seen: {seen}); change the phases' "
        "max_input_tokens or add files to data.train_files"
    )
