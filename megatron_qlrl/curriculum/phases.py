"""The prompts of one length phase, drawn in a fixed order that can be resumed anywhere."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from megatron_qlrl.errors import DataError
from megatron_qlrl.types import Prompt


class PhaseSampler:
    """Draws the prompts of phase k, min_tokens < tokens <= max_tokens (QwenLong-L1 section 3.1).

    Epoch e is a permutation of the pool that depends on (seed, phase, e) and on nothing else.
    A draw takes the next prompts of the permutation and goes on into the next epoch. Within one
    draw no prompt comes twice: one that the draw already holds waits until the draw is over and
    is then the first of the next. A draw larger than the pool shrinks to the pool, because a
    batch with a prompt twice is not the batch that was asked for.
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, phase: int, min_tokens: int, max_tokens: int, seed: int
    ):
        """
        Args:
            prompts: all prompts, with distinct uids; those of other lengths are left out.
            phase: index of the phase, part of the seed of the order.
            min_tokens, max_tokens: half-open range of prompt lengths, (min_tokens, max_tokens].

        Raises:
            DataError: no prompt has such a length.
        """
        assert len({p.uid for p in prompts}) == len(prompts), "prompt uids are not distinct"
        self.pool = {p.uid: p for p in prompts if min_tokens < p.num_tokens <= max_tokens}
        if not self.pool:
            raise DataError(_empty_pool(prompts, phase, min_tokens, max_tokens))
        self._uids = list(self.pool)
        self._seed, self._phase = seed, phase
        self._epoch = -1
        self._queue: list[str] = []

    def __len__(self) -> int:
        """Number of prompts in the pool."""
        return len(self._uids)

    @property
    def epoch(self) -> int:
        """Of the newest prompt drawn; 0 before the first draw."""
        return max(self._epoch, 0)

    def draw(self, n: int, taken: Collection[str] = ()) -> list[Prompt]:
        """The next n prompts, all different and none of `taken`; fewer when the pool has no
        more. Prompts passed over because they are taken come first in the next draw."""
        blocked = self.pool.keys() & set(taken)
        wanted = min(n, len(self) - len(blocked))
        drawn: dict[str, None] = {}
        waiting: list[str] = []
        while len(drawn) < wanted:
            uid = self._next_uid()
            if uid in drawn or uid in blocked:
                waiting.append(uid)
            else:
                drawn[uid] = None
        self._queue = waiting + self._queue
        return [self.pool[uid] for uid in drawn]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position in the order."""
        return {"epoch": self._epoch, "queue": list(self._queue)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken, with the same pool and seed."""
        self._epoch = state["epoch"]
        self._queue = list(state["queue"])

    def _next_uid(self) -> str:
        if not self._queue:
            self._epoch += 1
            order = np.random.default_rng([self._seed, self._phase, self._epoch])
            self._queue = [self._uids[i] for i in order.permutation(len(self))]
        return self._queue.pop(0)


def _empty_pool(prompts: Sequence[Prompt], phase: int, min_tokens: int, max_tokens: int) -> str:
    lengths = [p.num_tokens for p in prompts]
    seen = f"{min(lengths)} to {max(lengths)} tokens" if lengths else "no prompts at all"
    return (
        f"phase {phase} trains on prompts of {min_tokens} < tokens <= {max_tokens}, and none of "
        f"the {len(lengths)} prompts is that long (seen: {seen}); change the phases' "
        "max_input_tokens or add files to data.train_files"
    )
