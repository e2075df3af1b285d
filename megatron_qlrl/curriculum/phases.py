"""The prompts of one length phase, drawn in a fixed order that can be resumed anywhere."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_qlrl.errors import CheckpointError, DataError
from megatron_qlrl.types import Prompt, ScoredGroup


class PhaseSampler:
    """Draws the prompts of phase k, min_tokens < tokens <= max_tokens (QwenLong-L1 section 3.1).

    Epoch e is a permutation of the pool that depends on (seed, phase, e) and on nothing else.
    A draw takes the next prompts of the permutation and goes on into the next epoch. Within one
    draw no prompt comes twice: one that the draw already holds waits until the draw is over and
    is then the first of the next. A draw larger than the pool shrinks to the pool, because a
    batch with a prompt twice is not the batch that was asked for; `metrics` shows the pool size.
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
        self._pool = {p.uid: p for p in prompts if min_tokens < p.num_tokens <= max_tokens}
        if not self._pool:
            raise DataError(_empty_pool(prompts, phase, min_tokens, max_tokens))
        self._uids = list(self._pool)
        self._seed, self._phase = seed, phase
        self._lengths = [min_tokens, max_tokens]
        self._epoch = -1
        self._queue: list[str] = []
        self._attempts: dict[str, int] = {}
        self._mean_reward: dict[str, float] = {}

    def __len__(self) -> int:
        """Number of prompts in the pool."""
        return len(self._uids)

    def draw(self, n: int) -> list[Prompt]:
        """The next n prompts, all different; the whole pool when it holds fewer than n."""
        wanted = min(n, len(self))
        drawn: dict[str, None] = {}
        waiting: list[str] = []
        while len(drawn) < wanted:
            uid = self._next_uid()
            if uid in drawn:
                waiting.append(uid)
            else:
                drawn[uid] = None
        self._queue = waiting + self._queue
        return [self._pool[uid] for uid in drawn]

    def observe(self, groups: Sequence[ScoredGroup]) -> None:
        """Takes in the rewards of groups of this phase.

        A group counts as one attempt; its mean reward is the mean over its verdicts and
        replaces the one seen before. A group without any verdict says nothing and is left out.
        """
        for group in groups:
            uid = group.prompt.uid
            assert uid in self._pool, uid
            judged = group.rewards[np.isfinite(group.rewards)]
            if judged.size:
                self._attempts[uid] = self._attempts.get(uid, 0) + 1
                self._mean_reward[uid] = float(judged.mean())

    def metrics(self) -> dict[str, float]:
        """Pool size, epochs begun, and what is known about the pool's difficulty."""
        means = list(self._mean_reward.values())
        found = {
            "curriculum/phase": float(self._phase),
            "curriculum/pool_prompts": float(len(self)),
            "curriculum/epoch": float(max(self._epoch, 0)),
            "curriculum/seen_prompts": float(len(means)),
        }
        if means:
            found["curriculum/seen_rewards/mean"] = float(np.mean(means))
            found["curriculum/zero_reward_prompts"] = float(sum(m == 0 for m in means))
        return found

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: position in the order and statistics per prompt."""
        return {
            "seed": self._seed,
            "phase": self._phase,
            "lengths": self._lengths,
            "num_prompts": len(self),
            "epoch": self._epoch,
            "queue": list(self._queue),
            "attempts": dict(self._attempts),
            "mean_reward": dict(self._mean_reward),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken.

        Raises:
            CheckpointError: the state belongs to another seed, phase or set of prompts.
        """
        here = {
            "seed": self._seed,
            "phase": self._phase,
            "lengths": self._lengths,
            "num_prompts": len(self),
        }
        there = {key: state[key] for key in here}
        unknown = ({*state["queue"], *state["attempts"]}) - self._pool.keys()
        if here != there or unknown:
            raise CheckpointError(
                f"the saved data order is for {there}, this run has {here}"
                + (f", and prompts {sorted(unknown)[:3]} are gone" if unknown else "")
                + "; resume with the same data files, phases and run.seed, or start a new run.dir"
            )
        self._epoch = state["epoch"]
        self._queue = list(state["queue"])
        self._attempts = dict(state["attempts"])
        self._mean_reward = dict(state["mean_reward"])

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
