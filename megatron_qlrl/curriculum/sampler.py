"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): batches of groups that carry a gradient.

    begin -> draw -> (generate) -> observe --+
              ^                              |   until the batch is full, or the rounds or the
              +------------------------------+   prompts are used up
    take: the batch, and the groups that wait for later steps

Two kinds of groups wait: those that a full batch did not need, and, with a budget of tokens
(`rollout.tokens_per_round`), those with responses that go on. A group that waits comes first in the
next step; no token of a batch is older than `algorithm.max_staleness`.

It never ends a run: when the rounds or the prompts are used up, the batch is what there is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np

from megatron_qlrl.config.schema import AlgorithmConfig
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.curriculum.waiting import decode_group, encode_group
from megatron_qlrl.types import Budget, Prompt, ScoredGroup


@dataclass(frozen=True)
class Batch:
    """The groups of one step.

    Attributes:
        groups: what is trained on; those with `old_logprobs` waited from earlier steps.
        waiting: groups that wait for later steps; `hold` takes them before the next `begin`.
        generated: every group that became whole in this step.
    """

    groups: list[ScoredGroup]
    waiting: list[ScoredGroup]
    generated: list[ScoredGroup]
    metrics: dict[str, float]


@dataclass
class _Step:
    """The step that is being filled; `kept` grows from the whole groups that waited.

    Attributes:
        waited: all groups that waited and are not too old.
        unfinished: groups with responses that reached the budget in this step.
    """

    phase: int
    number: int
    version: int
    size: int
    last: bool
    waited: list[ScoredGroup]
    kept: list[ScoredGroup]
    budget: Budget | None
    unfinished: list[ScoredGroup] = field(default_factory=list[ScoredGroup])
    generated: list[ScoredGroup] = field(default_factory=list[ScoredGroup])
    rounds: int = 0

    @property
    def begun(self) -> Mapping[str, ScoredGroup]:
        return self.budget.begun if self.budget is not None else {}


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
        tokens_per_round: int | None = None,
    ) -> None:
        """`keep` decides whether a group of these raw rewards ([G], NaN = no verdict) is trained
        on; `tokens_per_round` is the budget of each response in a step, None for none."""
        self.curriculum = curriculum
        self._config, self._prompts_per_step = config, prompts_per_step
        self._carried_share, self._keep, self._warn = carried_share, keep, warn
        self._tokens_per_round = tokens_per_round
        self._waiting: list[ScoredGroup] = []
        self._phase = 0
        self._step: _Step | None = None

    def begin(self, phase: int, step: int, *, version: int, last: bool = False) -> None:
        """Begins the batch of a step with weights of `version`: `prompts_per_step` groups, or the
        phase's whole pool if it is smaller. Groups that waited come first, unless they are of an
        earlier phase or of weights that are too old.

        Args:
            last: the step is the phase's last: every response ends in it.
        """
        oldest = version - self._config.max_staleness
        waited = [g for g in self._waiting if phase == self._phase and g.weight_version >= oldest]
        size = min(self._prompts_per_step, self.curriculum.pool_size(phase))
        budget = self._budget([g for g in waited if not g.whole], oldest=oldest, last=last)
        kept = [g for g in waited if g.whole]
        self._step = _Step(phase, step, version, size, last, waited, kept, budget)

    def _budget(self, begun: Sequence[ScoredGroup], *, oldest: int, last: bool) -> Budget | None:
        """The budget of a step, or None if there is none and nothing to go on with. A group whose
        first tokens would be too old after this step's updates is due in this step."""
        if self._tokens_per_round is None and not begun:
            return None
        due = {
            group.prompt.uid
            for group in begun
            if group.weight_version < oldest + self._config.updates_per_step
        }
        tokens = None if last else self._tokens_per_round
        return Budget(tokens, {group.prompt.uid: group for group in begun}, due)

    @property
    def budget(self) -> Budget | None:
        """How far the responses of this step go; None: to their end, and none has begun."""
        return self._open_step.budget

    def draw(self) -> list[Prompt]:
        """The prompts of the next round; none when the step is over. Those of begun groups come
        first, in the first round.

        A prompt is drawn once in a step, because its responses would get the same seeds again.
        """
        now = self._open_step
        if now.rounds == self._config.generation_rounds:
            return []
        begun = [group.prompt for group in now.begun.values()] if not now.rounds else []
        # In a phase's last step begun groups become whole; in another one they may not, and as many
        # new prompts as a batch has groups are begun in every step.
        coming = len(begun) if now.last else 0
        missing = max(now.size - len(now.kept) - coming, 0)
        taken = {g.prompt.uid for g in (*now.kept, *now.generated, *now.unfinished)}
        # The epsilons keep rounding from changing what is a whole number on paper.
        prompts = begun + self.curriculum.draw(
            now.phase,
            ceil(missing * self._config.oversampling - 1e-9),
            max_carried=int(self._carried_share * now.size + 1e-9),
            taken=taken | now.begun.keys(),
        )
        now.rounds += bool(prompts)
        return prompts

    def observe(self, groups: Sequence[ScoredGroup]) -> None:
        """Takes in the groups of the prompts that `draw` gave."""
        now = self._open_step
        whole = [group for group in groups if group.whole]
        now.unfinished += [group for group in groups if not group.whole]
        self.curriculum.observe(now.phase, now.number, whole)
        now.generated += whole
        now.kept += [g for g in whole if self._keep(g.rewards)]

    def take(self) -> Batch:
        """Ends the step: its batch, with at most `size` groups. In the last step of a phase the
        batch holds every group that waited, even if they are more."""
        now = self._open_step
        exhausted = self._config.generation_rounds > 1 and len(now.kept) < now.size
        skip = exhausted and self._config.incomplete_batch == "skip"
        if exhausted:
            self._warn(
                f"step {now.number}: {len(now.kept)} of {now.size} groups carry a gradient after "
                f"{now.rounds} rounds ({len(now.generated)} groups generated); "
                + ("no update in this step" if skip else "training on what there is")
            )
        now.kept.sort(key=lambda group: group.weight_version)  # the oldest cannot wait any longer
        size = 0 if skip else now.size
        if now.last and now.begun:
            size = max(size, sum(group.weight_version < now.version for group in now.kept))
        groups, surplus = now.kept[:size], now.kept[size:]
        held = surplus if self._config.max_staleness else []
        self.curriculum.reached(now.phase, groups)
        ages = [now.version - g.weight_version for g in groups]
        metrics = {
            "batch/rounds": now.rounds,
            "batch/kept_groups": len(groups),
            "batch/filtered_groups": len(now.generated)
            + sum(group.whole for group in now.waited)
            - len(now.kept),
            "batch/expired_groups": len(self._waiting) - len(now.waited),
            "batch/held_groups": len(held),
            "batch/dropped_groups": len(surplus) - len(held),
            "batch/exhausted": exhausted,
            "batch/staleness/max": max(ages, default=0),
            "batch/staleness/mean": float(np.mean(ages)) if ages else 0.0,
        }
        if now.budget is not None:
            metrics |= round_metrics(now.budget, groups, now.unfinished, version=now.version)
        self._phase, self._waiting, self._step = now.phase, [], None
        return Batch(
            groups,
            held + now.unfinished,
            now.generated,
            {name: float(value) for name, value in metrics.items()},
        )

    def hold(self, waiting: Sequence[ScoredGroup]) -> None:
        """Keeps the groups of a batch that wait, with their old log-probs, for the next steps."""
        assert all(g.old_logprobs is not None for g in waiting)
        self._waiting = list(waiting)

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


def round_metrics(
    budget: Budget,
    groups: Sequence[ScoredGroup],
    unfinished: Sequence[ScoredGroup],
    *,
    version: int,
) -> dict[str, float]:
    """What the budget of a step did: the ages of the tokens trained on, and what waits."""
    ages = [version - r.token_versions for group in groups for r in group.rollouts]
    tokens = np.concatenate(ages) if ages else np.zeros(0)
    open_rollouts = [r for group in unfinished for r in group.rollouts if r.goes_on]
    return {
        "batch/staleness/token_mean": float(tokens.mean()) if len(tokens) else 0.0,
        "batch/stale_token_share": float((tokens > 0).mean()) if len(tokens) else 0.0,
        "batch/begun_groups": len(budget.begun),
        "batch/due_groups": len(budget.due),
        "batch/unfinished_groups": len(unfinished),
        "batch/unfinished_responses": len(open_rollouts),
        "batch/unfinished_tokens": sum(len(r.token_ids) for r in open_rollouts),
    }
