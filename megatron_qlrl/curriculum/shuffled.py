"""An order of prompts that can be resumed anywhere."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np


class Shuffled:
    """Draws uids in shuffled order, epoch after epoch.

    Epoch e is a permutation of all uids that depends on (key, e) and on nothing else. A draw takes
    the next ones of the permutation and continues into the next epoch. No draw holds a uid twice: a
    uid that comes up again within a draw is put first in the next one, and a draw larger than the
    whole shrinks to the whole.
    """

    def __init__(self, uids: Sequence[str], *, key: Sequence[int]) -> None:
        """`key` seeds the order together with the epoch."""
        self._uids, self._members, self._key = list(uids), frozenset(uids), list(key)
        self._epoch = -1
        self._queue: list[str] = []

    @property
    def epoch(self) -> int:
        """The epoch of the newest uid drawn; 0 before the first draw."""
        return max(self._epoch, 0)

    def left(self, taken: Collection[str] = ()) -> int:
        """Returns how many of the uids are not in `taken`."""
        return len(self._uids) - len(self._members & set(taken))

    def draw(self, n: int, taken: Collection[str] = ()) -> list[str]:
        """Returns the next n uids, all different and not in `taken`, or fewer if there are fewer.
        Those passed over because they are taken come first in the next draw."""
        blocked = self._members & set(taken)
        wanted = min(n, len(self._uids) - len(blocked))
        drawn: dict[str, None] = {}
        passed_over: list[str] = []
        while len(drawn) < wanted:
            uid = self._next()
            if uid in drawn or uid in blocked:
                passed_over.append(uid)
            else:
                drawn[uid] = None
        self._queue = passed_over + self._queue
        return list(drawn)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the order, ready for JSON."""
        return {"epoch": self._epoch, "queue": list(self._queue)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state_dict` was taken, with the same uids and key."""
        self._epoch = state["epoch"]
        self._queue = list(state["queue"])

    def _next(self) -> str:
        if not self._queue:
            self._epoch += 1
            order = np.random.default_rng([*self._key, self._epoch]).permutation(len(self._uids))
            self._queue = [self._uids[i] for i in order]
        return self._queue.pop(0)
