"""The prompts of one curriculum phase, drawn in a fixed order that can be resumed anywhere."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from megatron_qlrl.errors import DataError
from megatron_qlrl.types import Prompt


class PhasePool:
    """Draws the prompts of phase k, min_tokens < tokens <= max_tokens (QwenLong-L1 section 3.1).

    Epoch e is a permutation of the pool that depends on (seed, phase, e) and on nothing else. A
    draw takes the next prompts of the permutation and continues into the next epoch. No draw holds
    a prompt twice: a prompt that comes up again within a draw is put first in the next one, and a
    draw larger than the pool shrinks to the pool.
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
        self.prompts = {p.uid: p for p in prompts if min_tokens < p.num_tokens <= max_tokens}
        if not self.prompts:
            raise DataError(_empty_pool(prompts, phase, min_tokens, max_tokens))
        self._seed, self._phase = seed, phase
        self._epoch = -1
        self._queue: list[str] = []

    def __len__(self) -> int:
        """Number of prompts in the pool."""
        return len(self.prompts)

    @property
    def epoch(self) -> int:
        """The epoch of the newest prompt drawn; 0 before the first draw."""
        return max(self._epoch, 0)

    def draw(self, n: int, taken: Collection[str] = ()) -> list[Prompt]:
        """Returns the next n prompts, all different and not in `taken`, or fewer if the pool has
        fewer. Prompts passed over because they are taken come first in the next draw."""
        blocked = self.prompts.keys() & set(taken)
        wanted = min(n, len(self) - len(blocked))
        drawn: dict[str, None] = {}
        passed_over: list[str] = []
        while len(drawn) < wanted:
            uid = self._next_uid()
            if uid in drawn or uid in blocked:
                passed_over.append(uid)
            else:
                drawn[uid] = None
        self._queue = passed_over + self._queue
        return [self.prompts[uid] for uid in drawn]

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the order, ready for JSON."""
        return {"epoch": self._epoch, "queue": list(self._queue)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state_dict` was taken, with the same prompts and seed."""
        self._epoch = state["epoch"]
        self._queue = list(state["queue"])

    def _next_uid(self) -> str:
        if not self._queue:
            self._epoch += 1
            rng = np.random.default_rng([self._seed, self._phase, self._epoch])
            uids = list(self.prompts)
            self._queue = [uids[i] for i in rng.permutation(len(uids))]
        return self._queue.pop(0)


def _empty_pool(prompts: Sequence[Prompt], phase: int, min_tokens: int, max_tokens: int) -> str:
    lengths = [p.num_tokens for p in prompts]
    seen = f"{min(lengths)} to {max(lengths)} tokens" if lengths else "no prompts at all"
    return (
        f"phase {phase} trains on prompts of {min_tokens} < tokens <= {max_tokens}, and none of "
        f"the {len(lengths)} prompts is that long (seen: {seen}); change the phases' "
        "max_input_tokens or add files to data.train_files"
    )
