"""Policy losses as plain functions on flat response tokens ([M]); METHOD: Eq. 3-6 of
arXiv 2505.17667 (GRPO, DAPO), dual clip from arXiv 1912.09729, k1/k3 from Schulman's note,
truncated importance weights against the engine as in verl's rollout correction (token level), and
its masks of whole responses by the geometric mean.

Nothing here averages: each token's loss weight already holds the aggregation over the whole
optimizer batch, so a loss is a weighted sum and the sum over any split is the same.

Differences of log-probs are clamped before they are exponentiated, at the limits of verl
(`compute_policy_loss` and `kl_penalty` in verl/trainer/ppo/core_algos.py): e^95 is infinite in
float32. A clamped value has no gradient, in verl as here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from typing import Any

import torch

from megatron_qlrl.config.schema import AlgorithmConfig

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +- this (e^20 is about 5e8)."""
MAX_K3 = 10.0
"""k3 is clamped to this; it gets there at log p - log p_ref = -2.6 and 11."""


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped policy loss with the settings of the config's algorithm section.

    Attributes:
        sum_over_cp: adds up a tensor of all context parallel ranks, which share each response,
            in place.
    """

    config: AlgorithmConfig
    sum_over_cp: Callable[[torch.Tensor], Any] = lambda _: None

    def __call__(
        self, logprobs: torch.Tensor, entropy: torch.Tensor, columns: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns (weighted sum to minimise, per-token sums for the metrics). A term whose
        coefficient is 0 is left out (0 times infinity would be NaN), but its metric is reported.

        Args:
            logprobs, entropy: [M], with gradient.
            columns: float32 [M]: loss_weights, response_weights, advantages, and old_logprobs,
                ref_logprobs, engine_logprobs where they are known (importance weights need the
                engine's).
                Where old_logprobs are missing or NaN, the policy is its own old policy: ratio 1
                with the right gradient. `rollout_rs` needs responses (int64 [M]), the number of
                each token's response in the row, and num_responses of the row (a scalar), too.
        """
        config = self.config
        loss_weights, advantages = columns["loss_weights"], columns["advantages"]
        own = logprobs.detach()
        old = columns.get("old_logprobs", own)
        old = torch.where(old.isnan(), own, old)
        log_ratio = _bounded(logprobs - old)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        objective = torch.minimum(ratio * advantages, clipped * advantages)
        lower = objective
        if config.dual_clip is not None:
            floor = torch.maximum(objective, config.dual_clip * advantages)
            lower = torch.where(advantages < 0, floor, objective)
        sums = {
            "actor/entropy": entropy.sum(),
            "actor/response_entropy": (entropy * columns["response_weights"]).sum(),
            "actor/ppo_kl": -log_ratio.sum(),
            "actor/pg_clipfrac": (clipped * advantages < ratio * advantages).sum(),
            "actor/pg_clipfrac_lower": (lower > objective).sum(),
        }
        if config.rollout_is_threshold is not None and len(logprobs):  # a rank may have no work
            ratio_to_engine = _bounded(old - columns["engine_logprobs"]).exp()
            importance = ratio_to_engine.clamp(max=config.rollout_is_threshold)
            lower = importance * lower
            high = (ratio_to_engine > importance).sum()
            sums |= {
                "rollout_corr/rollout_is_mean": importance.sum(),
                "rollout_corr/rollout_is_ratio_fraction_high": high,
            }
        if config.rollout_rs is not None and "engine_logprobs" in columns:
            kept = self._kept(old, columns)
            sums["rollout_corr/rollout_rs_masked_fraction"] = (~kept).sum()
            # Multiplied, so that what is not finite stays visible.
            loss_weights = loss_weights * kept
        token_loss = -lower
        sums["actor/pg_loss"] = (token_loss * loss_weights).sum()
        if config.entropy_coef:  # without its gradient the log-probs' backward pass is shorter
            token_loss = token_loss - config.entropy_coef * entropy
        if "ref_logprobs" in columns:
            kl = reference_kl(logprobs, columns["ref_logprobs"], config.kl_kind)
            if config.kl_coef:
                token_loss = token_loss + config.kl_coef * kl
            sums["actor/kl_loss"] = kl.sum()
        if "engine_logprobs" in columns:
            sums |= mismatch(old, columns["engine_logprobs"])
        return (token_loss * loss_weights).sum(), {k: v.detach() for k, v in sums.items()}

    def _kept(self, old: torch.Tensor, columns: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns bool [M]: the geometric mean of p_old / p_engine over the token's whole response
        is in the band."""
        low, high = self.config.rollout_rs_band
        responses = columns["responses"]
        log_ratio = (old - columns["engine_logprobs"]).double()
        sums = log_ratio.new_zeros(2, int(columns["num_responses"]))
        sums[0].index_add_(0, responses, log_ratio)
        sums[1].index_add_(0, responses, torch.ones_like(log_ratio))
        self.sum_over_cp(sums)
        mean = sums[0] / sums[1]
        return ((mean >= log(low)) & (mean <= log(high)))[responses]


def sft_loss(
    logprobs: torch.Tensor, entropy: torch.Tensor, columns: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the weighted negative log-likelihood of the response tokens, and its metrics."""
    loss = -(logprobs * columns["loss_weights"]).sum()
    sums = {"sft/nll": -logprobs.sum(), "actor/entropy": entropy.sum()}
    return loss, {k: v.detach() for k, v in sums.items()}


def reference_kl(logprobs: torch.Tensor, ref: torch.Tensor, kind: str) -> torch.Tensor:
    """Returns a per-token KL estimate of policy from reference: k1 = d, k3 = e^{-d} - 1 + d with
    d = log p - log p_ref (k3 is never negative and has less variance). In k3, d and then the
    estimate are clamped (MAX_LOG_RATIO, MAX_K3); a token beyond gets no gradient from it."""
    difference = logprobs - ref
    if kind == "k1":
        return difference
    difference = _bounded(difference)
    return ((-difference).exp() - 1 + difference).clamp(max=MAX_K3)


def _bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def mismatch(trainer: torch.Tensor, engine: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns how far trainer and engine disagree on sampled tokens, as sums and maxima."""
    difference = (trainer - engine).abs()
    probability = (trainer.exp() - engine.exp()).abs()
    return {
        "training/rollout_logprobs_diff_mean": difference.sum(),
        "training/rollout_probs_diff_mean": probability.sum(),
        "training/rollout_probs_diff_max": probability.max() if len(probability) else
        trainer.new_zeros(()),
        "training/rollout_logprobs_diff_max": difference.max() if len(difference) else
        trainer.new_zeros(()),
    }  # fmt: skip
