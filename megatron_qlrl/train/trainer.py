"""One optimizer batch: rows, reference and old log-probs, updates. RL and SFT share it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from megatron_qlrl.config.schema import OptimizerConfig, PolicyConfig
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.packing.distribute import group_rows, make_rows
from megatron_qlrl.packing.rows import Aggregation, slice_group
from megatron_qlrl.parallel.collectives import gather_dicts
from megatron_qlrl.plan.flops import UPDATE_TO_FORWARD, block_flops
from megatron_qlrl.plan.hardware import peak_flops
from megatron_qlrl.platform.device import device_name
from megatron_qlrl.policy.entropy_control import EntropyControl
from megatron_qlrl.policy.optimizer import learning_rate
from megatron_qlrl.policy.policy import Loss, Policy
from megatron_qlrl.policy.selfcheck import check_sharing
from megatron_qlrl.types import PackedRow, ScoredGroup, TrainGroup, TrainResponse


class Trainer:
    """Trains the policy. Methods are collective."""

    def __init__(
        self,
        policy: Policy,
        *,
        config: PolicyConfig,
        optimizer_config: OptimizerConfig,
        loss: Loss,
        aggregation: Aggregation,
        constant_tokens: int,
        updates_per_step: int,
        total_steps: int,
        use_reference: bool,
        reference_every: int,
        permit: Callable[[Mapping[str, float]], bool],
        entropy_control: EntropyControl | None = None,
    ) -> None:
        """
        Args:
            aggregation, constant_tokens: how token losses are averaged (see `token_weight`).
            updates_per_step: optimizer updates on one batch (mini-batches of whole groups).
            total_steps: of the whole run, for the learning rate.
            use_reference: the policy has a reference, whose log-probs the loss wants.
            reference_every: they are computed in each step whose number it divides.
            permit: decides whether an update with these metrics is taken.
            entropy_control: masks responses while the entropy is too high.
        """
        self.policy = policy
        self._config, self._optimizer_config = config, optimizer_config
        self._loss, self._permit, self._entropy_control = loss, permit, entropy_control
        self._aggregation: Aggregation = aggregation
        self._constant_tokens = constant_tokens
        self._updates_per_step = updates_per_step
        self._total_updates = total_steps * updates_per_step
        self._use_reference, self._reference_every = use_reference, reference_every
        self._cost = partial(block_flops, policy.model_shape)
        self._sharing_checked = not config.share_prompts

    def update(self, groups: Sequence[TrainGroup], *, step: int, meter: Meter) -> None:
        """Trains on a step's batch; the metrics go into the meter.

        The old policy is the one that sampled the batch, so its log-probs of all mini-batches but
        the first come before the first update. The first is computed with the same weights by its
        own update, and the loss takes those log-probs where it has no others.
        """
        shares = split_updates(groups, self._updates_per_step)
        self._check_sharing(groups, meter)
        with meter.timed("adv"):
            packed = [self._pack(share) for share in shares]
            batches = [rows for rows, _ in packed]
        if self._use_reference and step % self._reference_every == 0:
            with meter.timed("ref"), self.policy.as_reference():
                batches = [self.policy.add_logprobs(rows, "ref_logprobs") for rows in batches]
        if len(batches) > 1:
            with meter.timed("old_log_prob"):
                later = [self.policy.add_logprobs(rows, "old_logprobs") for rows in batches[1:]]
                batches = [batches[0], *later]
        with meter.timed("update_actor"):
            for number, rows in enumerate(batches, step * self._updates_per_step):
                rate = learning_rate(
                    self._optimizer_config, step=number, total_steps=self._total_updates
                )
                meter.update(self._take_update(rows, rate))
        flops = UPDATE_TO_FORWARD * sum(flops for _, flops in packed)
        meter.update(self._speed(flops, groups, seconds=meter.seconds("update_actor")))

    def _take_update(self, rows: Sequence[PackedRow], rate: float) -> dict[str, float]:
        control = self._entropy_control
        if control is not None:
            rows = control.masked(rows)
        metrics = self.policy.update(rows, self._loss, lr=rate, permit=self._permit)
        if control is not None:
            metrics["actor/aepo_masking"] = float(control.masking)
            control.observe(metrics["actor/response_entropy"])
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Returns what later updates depend on beside the policy, ready for JSON."""
        control = self._entropy_control
        return {} if control is None else {"masking": control.masking}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        if self._entropy_control is not None:
            self._entropy_control.masking = state.get("masking", False)

    def with_old_logprobs(self, groups: Sequence[ScoredGroup], meter: Meter) -> list[ScoredGroup]:
        """Groups that are to wait, with the log-probs of the present weights for the tokens that
        these sampled: they are gone when the groups are trained on. (The engine's log-probs would
        not do: they are off by the mismatch, and a ratio must be 1 where no weight has changed.)"""
        new = [i for i, group in enumerate(groups) if _has_new_tokens(group)]
        if not new:
            return list(groups)
        waiting = [_without_advantages(groups[i]) for i in new]
        self._check_sharing(waiting, meter)
        with meter.timed("old_log_prob"):
            rows, _ = self._pack(waiting)
            logprobs = gather_dicts(
                {
                    (group, sample): row.columns["old_logprobs"][place]
                    for row in self.policy.add_logprobs(rows, "old_logprobs")
                    for group, sample, place in row.slices()
                }
            )
        done = list(groups)
        for number, i in enumerate(new):
            samples = range(len(groups[i].rollouts))
            done[i] = replace(groups[i], old_logprobs=tuple(logprobs[number, k] for k in samples))
        return done

    def _pack(self, groups: Sequence[TrainGroup]) -> tuple[list[PackedRow], float]:
        """This data-parallel rank's rows, and the forward FLOPs of all ranks' rows."""
        dp = self.policy.context.dp
        ranks = make_rows(
            groups,
            num_ranks=dp.size,
            max_tokens=self._config.max_tokens_per_row,
            share_prompts=self._config.share_prompts,
            aggregation=self._aggregation,
            constant_tokens=self._constant_tokens,
            cost=self._cost,
        )
        flops = sum(
            self._cost(block.prompt[1] - block.prompt[0], [end - at for at, end in block.responses])
            for rows in ranks
            for row in rows
            for block in row.blocks
        )
        return ranks[dp.rank], flops

    def _check_sharing(self, groups: Sequence[TrainGroup], meter: Meter) -> None:
        """Once, before the first batch with a shared prompt is trained on."""
        if self._sharing_checked:
            return
        slices = (
            slice_group(g, prompt_tokens=256, responses=3, response_tokens=128) for g in groups
        )
        first = next((s for s in slices if len(s.responses) > 1), None)
        if first is None:
            return
        shared, separate = (
            group_rows(
                first,
                max_tokens=self._config.max_tokens_per_row,
                share_prompt=share,
                cost=self._cost,
            )
            for share in (True, False)
        )
        with meter.timed("self_check"):
            check_sharing(self.policy, shared, separate)
        self._sharing_checked = True

    def _speed(
        self, flops: float, groups: Sequence[TrainGroup], *, seconds: float
    ) -> dict[str, float]:
        """Model FLOP/s of each rank during the updates, and tokens per second of all of them."""
        if not flops:
            return {}
        tokens = sum(len(g.prompt_ids) + sum(len(r.token_ids) for r in g.responses) for g in groups)
        rate = flops / seconds / self.policy.context.world_size
        metrics = {
            "perf/tflops/actor": rate / 1e12,
            "perf/train_tokens_per_s": tokens / seconds,
        }
        peak = peak_flops(device_name())
        return metrics | ({"perf/mfu/actor": rate / peak} if peak else {})


def split_updates(groups: Sequence[TrainGroup], num: int) -> list[Sequence[TrainGroup]]:
    """The batch in at most `num` mini-batches of whole groups, nearly equal, none empty."""
    bounds = [len(groups) * i // num for i in range(num + 1)]
    return [groups[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if a < b]


def _without_advantages(group: ScoredGroup) -> TrainGroup:
    old = group.old_logprobs or [None] * len(group.rollouts)
    responses = tuple(
        TrainResponse(rollout.token_ids, 0.0, None, known)
        for rollout, known in zip(group.rollouts, old, strict=True)
    )
    return TrainGroup(group.prompt.token_ids, responses)


def _has_new_tokens(group: ScoredGroup) -> bool:
    """Whether the present weights sampled some of its tokens."""
    return group.old_logprobs is None or any(np.isnan(old).any() for old in group.old_logprobs)
