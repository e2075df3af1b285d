"""Losses against loops written from the paper's formulas (METHOD: Eq. 3-6), one token at a
time in Python floats; gradients by central differences of those loops."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_qlrl.config.schema import AlgorithmConfig
from megatron_qlrl.packing.distribute import make_rows
from megatron_qlrl.packing.rows import empty_row, token_loss_weights
from megatron_qlrl.policy.loss import PolicyLoss, mismatch, reference_kl, sft_loss
from megatron_qlrl.types import TrainGroup, TrainResponse

PLAIN = PolicyLoss(
    AlgorithmConfig.model_validate(
        {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None, "rollout_is_threshold": None}
        | {"kl_coef": 0.0, "kl_kind": "k3", "entropy_coef": 0.0}
    )
)
MAX_TOKENS = 16


@dataclass
class Token:
    """One response token as the loops see it."""

    logprob: float
    old: float
    ref: float
    entropy: float
    advantage: float
    engine: float = 0.0


# groups -> responses -> tokens
Batch = list[list[list[Token]]]


def batch_of(seed: int = 0) -> Batch:
    """Three groups with responses of 1 to 5 tokens, one of them empty. Log-ratios spread over
    both clip limits, and far enough beyond the upper one to meet the dual clip."""
    rng = np.random.default_rng(seed)
    # e^-0.5 and e^0.4 are below a threshold of 2, e^1.1 is above it
    to_engine = itertools.cycle([-0.5, 0.4, 1.1])

    def response(n: int) -> list[Token]:
        advantage = float(rng.normal())
        return [
            Token(
                logprob=(logprob := float(rng.normal(-2, 0.5))),
                old=(old := logprob - float(rng.choice([-0.9, -0.1, 0.05, 0.24, 0.4, 1.4]))),
                ref=logprob - float(rng.normal(0, 0.4)),
                entropy=float(rng.uniform(0, 3)),
                advantage=advantage,
                engine=old - next(to_engine),
            )
            for _ in range(n)
        ]

    return [[response(n) for n in lengths] for lengths in ([2, 5, 1], [4, 0, 3], [5, 5])]


EXTREME = (-95.0, -30.0, -20.5, -19.5, -15.0, -3.0, 2.0, 15.0, 19.5, 20.5, 30.0, 95.0)
"""Log-ratios beyond and just inside the limits at which verl clamps (20; e^3 - 1 - 3 > 10)."""


def extreme_batch() -> Batch:
    """A group of two responses with opposite advantages for every pair of extreme log-ratios."""
    return [
        [
            [Token(-200.0, -200.0 - ratio, -200.0 - other, 1.0, advantage, -200.0 - ratio - other)]
            for advantage in (1.5, -1.5)
        ]
        for ratio in EXTREME
        for other in EXTREME
    ]


def tokens_of(batch: Batch) -> list[Token]:
    return [token for group in batch for response in group for token in response]


def bounded(value: float, limit: float) -> float:
    return max(-limit, min(limit, value))


def changed(loss: PolicyLoss, **settings: Any) -> PolicyLoss:
    return PolicyLoss(AlgorithmConfig.model_validate(loss.config.model_dump() | settings))


def objective(token: Token, loss: PolicyLoss) -> float:
    """What one token adds to the objective that is maximised."""
    config = loss.config
    ratio = math.exp(bounded(token.logprob - token.old, 20))
    low, high = 1 - config.clip_low, 1 + config.clip_high
    clipped = low if ratio < low else high if ratio > high else ratio
    value = min(ratio * token.advantage, clipped * token.advantage)
    if config.dual_clip is not None and token.advantage < 0:
        value = max(value, config.dual_clip * token.advantage)
    if config.rollout_is_threshold is not None:
        value *= min(math.exp(bounded(token.old - token.engine, 20)), config.rollout_is_threshold)
    difference = token.logprob - token.ref
    # Both estimate KL(policy || reference) from a sample of the policy.
    safe = bounded(difference, 20)
    kl = difference if config.kl_kind == "k1" else bounded(math.exp(-safe) - 1 + safe, 10)
    return value - config.kl_coef * kl + config.entropy_coef * token.entropy


def brute_loss(batch: Batch, loss: PolicyLoss, aggregation: str) -> float:
    responses = [response for group in batch for response in group]
    sums = [sum(objective(t, loss) for t in response) for response in responses]
    if aggregation == "sequence_mean":  # GRPO: mean over tokens, then over responses
        means = [s / len(r) for s, r in zip(sums, responses, strict=True) if r]
        return -sum(means) / len(responses)
    if aggregation == "token_mean":  # DAPO: over all tokens of the batch
        return -sum(sums) / sum(map(len, responses))
    return -sum(s / MAX_TOKENS for s in sums) / len(responses)  # Dr. GRPO


def differences(batch: Batch, field: str, value: Callable[[Batch], float]) -> list[float]:
    """Central differences of `value` in one field of every token."""
    slopes = []
    step = 1e-6
    for token in tokens_of(batch):
        at = getattr(token, field)
        setattr(token, field, at + step)
        above = value(batch)
        setattr(token, field, at - step)
        below = value(batch)
        setattr(token, field, at)
        slopes.append((above - below) / (2 * step))
    return slopes


def train_groups(batch: Batch) -> list[TrainGroup]:
    """The same batch as records; token ids number the tokens from 0 in order."""
    number = iter(range(1000))

    def response(tokens: list[Token]) -> TrainResponse:
        ids = np.array([next(number) for _ in tokens], np.int32)
        return TrainResponse(ids, tokens[0].advantage if tokens else 0.0)

    return [
        TrainGroup(np.array([1000, 1001, 1002], np.int32), tuple(response(r) for r in group))
        for group in batch
    ]


def column(tokens: list[Token], field: str) -> torch.Tensor:
    return torch.tensor([getattr(t, field) for t in tokens], dtype=torch.float64)


def weights_of(batch: Batch, aggregation: Any) -> torch.Tensor:
    per_response = token_loss_weights(train_groups(batch), aggregation, constant_tokens=MAX_TOKENS)
    return torch.tensor(
        [
            weight
            for group, weights in zip(batch, per_response, strict=True)
            for response, weight in zip(group, weights, strict=True)
            for _ in response
        ],
        dtype=torch.float64,
    )


def run(
    loss: PolicyLoss,
    batch: Batch,
    aggregation: str,
    *leave_out: str,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, gradient of the log-probs, gradient of the entropies, sums)."""
    tokens = tokens_of(batch)
    logprobs = column(tokens, "logprob").requires_grad_()
    entropy = column(tokens, "entropy").requires_grad_()
    columns = {
        "loss_weights": weights_of(batch, aggregation),
        "response_weights": weights_of(batch, "sequence_mean"),
        "advantages": column(tokens, "advantage"),
        "old_logprobs": column(tokens, "old"),
        "ref_logprobs": column(tokens, "ref"),
        "engine_logprobs": column(tokens, "engine"),
    }
    columns = {k: v.to(dtype) for k, v in columns.items() if k not in leave_out}
    responses = [response for group in batch for response in group]
    columns["responses"] = torch.tensor([k for k, r in enumerate(responses) for _ in r])
    columns["num_responses"] = torch.tensor(len(responses))
    total, sums = loss(logprobs.to(dtype), entropy.to(dtype), columns)
    by_logprob, by_entropy = torch.autograd.grad(total, [logprobs, entropy], materialize_grads=True)
    return total, by_logprob, by_entropy, sums


SETTINGS = {
    "clip": PLAIN,
    "symmetric": changed(PLAIN, clip_high=0.2),
    "dual clip": changed(PLAIN, dual_clip=3.0),
    "k1": changed(PLAIN, kl_coef=0.3, kl_kind="k1"),
    "k3": changed(PLAIN, kl_coef=0.3, kl_kind="k3"),
    "entropy": changed(PLAIN, entropy_coef=0.01),
    "importance": changed(PLAIN, rollout_is_threshold=2.0),
    "all": changed(
        PLAIN,
        clip_low=0.1,
        clip_high=0.5,
        dual_clip=2.0,
        kl_coef=0.05,
        entropy_coef=0.02,
        rollout_is_threshold=2.0,
    ),  # fmt: skip
}


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_value_and_gradients_equal_the_paper(settings: str, aggregation: str) -> None:
    loss, batch = SETTINGS[settings], batch_of()
    total, by_logprob, by_entropy, _ = run(loss, batch, aggregation)

    def value(b: Batch) -> float:
        return brute_loss(b, loss, aggregation)

    assert total.item() == pytest.approx(value(batch), rel=1e-12)
    np.testing.assert_allclose(by_logprob, differences(batch, "logprob", value), atol=1e-9)
    np.testing.assert_allclose(by_entropy, differences(batch, "entropy", value), atol=1e-9)


@pytest.mark.parametrize("settings", SETTINGS)
def test_extreme_log_ratios_stay_finite(settings: str) -> None:
    """e^95 is infinite in float32, and 0 * inf is NaN."""
    loss, batch = SETTINGS[settings], extreme_batch()
    total, by_logprob, _, sums = run(loss, batch, "token_mean")

    assert total.item() == pytest.approx(brute_loss(batch, loss, "token_mean"), rel=1e-12)
    # Beside a value of e^20 a small slope is lost in central differences: one token at a time,
    # and its objective without and of the KL term.
    tokens = tokens_of(batch)
    parts = [(t, changed(loss, kl_coef=0.0)) for t in tokens]
    parts += [(replace(t, advantage=0.0), loss) for t in tokens]
    slopes = [
        differences([[[t]]], "logprob", lambda b, of=of: brute_loss(b, of, "token_mean"))[0]
        for t, of in parts
    ]
    want = np.reshape(slopes, (2, len(tokens))).sum(0) / len(tokens)
    np.testing.assert_allclose(by_logprob, want, rtol=1e-6, atol=1e-8)
    narrow = run(loss, batch, "token_mean", dtype=torch.float32)
    assert narrow[0].item() == pytest.approx(total.item(), rel=1e-4)
    for numbers in (narrow[1], *narrow[3].values(), *sums.values()):
        assert torch.isfinite(numbers).all()


@pytest.mark.parametrize(
    ("log_ratio", "kl", "loss", "gradient"),
    [
        # worked by hand: advantage -2, kl_coef 0.5, no dual clip
        (95.0, 95.0, 2 * math.exp(20) + 0.5 * 10, 0.0),  # (k3 at 20 is 19, above 10)
        (-95.0, -95.0, 2 * 0.8 + 0.5 * 10, 0.0),
        (-95.0, -15.0, 2 * 0.8 + 0.5 * 10, 0.0),  # not 3.3 million
        (2.0, -2.0, 2.5 * math.exp(2) - 0.5 * 3, 1.5 * math.exp(2) + 0.5),
    ],
)
def test_clamped_terms_have_no_gradient(
    log_ratio: float, kl: float, loss: float, gradient: float
) -> None:
    token = Token(-100.0, -100.0 - log_ratio, -100.0 - kl, 0.0, -2.0)
    settings = changed(PLAIN, kl_coef=0.5)
    total, by_logprob, _, sums = run(settings, [[[token]]], "token_mean", "engine_logprobs")
    assert total.item() == pytest.approx(loss)
    assert by_logprob.item() == pytest.approx(gradient)
    assert sums["actor/ppo_kl"].item() == pytest.approx(-max(-20, min(20, log_ratio)))


def test_a_term_with_coefficient_0_is_left_out_and_logged() -> None:
    """Not even what is not finite gets from there into the loss."""
    token = Token(-1.0, -1.0, math.nan, math.nan, 2.0)
    total, by_logprob, by_entropy, sums = run(PLAIN, [[[token]]], "token_mean", "engine_logprobs")
    assert (total.item(), by_logprob.item(), by_entropy.item()) == (-2.0, -2.0, 0.0)
    assert math.isnan(sums["actor/kl_loss"])
    far = replace(token, ref=94.0, entropy=0.0)
    sums = run(PLAIN, [[[far]]], "token_mean", "engine_logprobs", dtype=torch.float32)[3]
    assert sums["actor/kl_loss"].item() == 10.0


def test_the_batch_meets_every_branch() -> None:
    """The test above says nothing about a branch that its tokens never take."""
    seen = set()
    for token in tokens_of(batch_of()):
        ratio = math.exp(token.logprob - token.old)
        place = "low" if ratio < 0.8 else "high" if ratio > 1.28 else "inside"
        seen.add((place, token.advantage > 0))
        if ratio > 3 and token.advantage < 0:
            seen.add(("dual", False))
    assert len(seen) == 7


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "gradient"),
    [
        # worked by hand for clip_low 0.2, clip_high 0.28; gradient = d loss / d log-prob
        (1.5, 2.0, None, -2.56, 0.0),  # above the limit: 1.28 * 2
        (1.25, 2.0, None, -2.5, -2.5),  # between 1.2 and 1.28: a symmetric clip would cut it
        (0.5, 2.0, None, -1.0, -1.0),  # min keeps the unclipped side
        (0.5, -2.0, None, 1.6, 0.0),  # below the limit: 0.8 * 2
        (1.5, -2.0, None, 3.0, 3.0),
        (5.0, -2.0, 3.0, 6.0, 0.0),  # dual clip: at most 3 * 2
        (2.0, -2.0, 3.0, 4.0, 4.0),
        (5.0, 2.0, 3.0, -2.56, 0.0),  # dual clip leaves positive advantages alone
    ],
)
def test_one_token_by_hand(
    ratio: float, advantage: float, dual_clip: float | None, loss: float, gradient: float
) -> None:
    token = Token(math.log(ratio) - 2.0, -2.0, 0.0, 0.0, advantage)
    settings = changed(PLAIN, dual_clip=dual_clip)
    total, by_logprob, _, _ = run(settings, [[[token]]], "token_mean", "ref_logprobs")
    assert total.item() == pytest.approx(loss)
    assert by_logprob.item() == pytest.approx(gradient)


@pytest.mark.parametrize(
    ("old", "engine", "threshold", "loss", "gradient", "high"),
    [
        # the trainer's probability over the engine's; ratio to the old policy is 1, advantage 2
        (0.3, 0.2, 2.0, -3.0, -3.0, 0),
        (0.2, 0.4, 2.0, -1.0, -1.0, 0),
        (0.6, 0.2, 2.0, -4.0, -4.0, 1),
        (0.6, 0.2, None, -2.0, -2.0, None),
    ],
)
def test_importance_weight_by_hand(
    old: float, engine: float, threshold: float | None, loss: float, gradient: float, high: int
) -> None:
    token = Token(math.log(old), math.log(old), 0.0, 0.0, 2.0, math.log(engine))
    settings = changed(PLAIN, rollout_is_threshold=threshold)
    total, by_logprob, _, sums = run(settings, [[[token]]], "token_mean")
    assert total.item() == pytest.approx(loss)
    assert by_logprob.item() == pytest.approx(gradient)
    assert sums.get("rollout_corr/rollout_is_ratio_fraction_high") == high
    if threshold is not None:
        assert sums["rollout_corr/rollout_is_mean"].item() == pytest.approx(-loss / 2)


def test_without_old_logprobs_the_policy_is_its_own_old_policy() -> None:
    batch = batch_of()
    total, by_logprob, _, sums = run(PLAIN, batch, "token_mean", "old_logprobs")
    on_policy = [[[replace(t, old=t.logprob) for t in r] for r in g] for g in batch]

    def value(b: Batch) -> float:
        return brute_loss(b, PLAIN, "token_mean")

    advantages = [t.advantage for t in tokens_of(batch)]
    assert total.item() == pytest.approx(-np.mean(advantages))
    np.testing.assert_allclose(by_logprob, differences(on_policy, "logprob", value), atol=1e-9)
    assert by_logprob.abs().sum() > 0  # detached, or the ratio would have no gradient
    assert sums["actor/ppo_kl"] == 0
    assert sums["actor/pg_clipfrac"] == 0


@pytest.mark.parametrize(
    ("ratios", "kept"),
    [
        # [response][token]: the trainer's probability over the engine's
        ([[2.0, 0.5], [1.1, 1.1]], [True, False]),  # means 1 and 1.1
        ([[1.2, 1.0, 1.0], [0.8]], [False, False]),  # 1.2^(1/3) = 1.063
        ([[1.2, 1.0, 1.0, 1.0]], [True]),  # 1.2^(1/4) = 1.047
        ([[0.96], [0.94, 1.0, 0.86]], [True, False]),  # 0.8084^(1/3) = 0.932
        ([[], [1.0]], [True, True]),
    ],
)
def test_responses_are_masked_by_the_geometric_mean_of_their_ratios(
    ratios: list[list[float]], kept: list[bool]
) -> None:
    """Band 0.95 to 1.05; advantage 2, ratio to the old policy 1, KL and entropy are masked too."""
    loss = changed(
        PLAIN, rollout_rs="geometric", rollout_rs_band=(0.95, 1.05), kl_coef=0.5, entropy_coef=0.1
    )
    group = [[Token(-1.0, -1.0, -1.0, 3.0, 2.0, -1.0 - math.log(r)) for r in response]
             for response in ratios]  # fmt: skip
    total, by_logprob, by_entropy, sums = run(loss, [group], "token_mean")
    mask = [1.0 if keep else 0.0 for r, keep in zip(ratios, kept, strict=True) for _ in r]
    weights = np.array(mask) / len(mask)  # masked tokens count in the mean
    np.testing.assert_allclose(by_logprob, -2 * weights)
    np.testing.assert_allclose(by_entropy, -0.1 * weights)
    assert total.item() == pytest.approx(-2.3 * weights.sum())
    assert sums["rollout_corr/rollout_rs_masked_fraction"] == mask.count(0.0)


def test_context_parallel_ranks_add_up_their_parts_of_a_response() -> None:
    """Ratios 1.2 | 1, 1, 1 lie on two ranks. The whole response's mean, 1.047, is in the band,
    the first rank's own is not; that rank adds what the other one has."""

    def add(sums: torch.Tensor) -> None:
        sums += torch.tensor([[0.0], [3.0]], dtype=sums.dtype)

    loss = changed(PLAIN, rollout_rs="geometric", rollout_rs_band=(0.95, 1.05))
    token = Token(-1.0, -1.0, -1.0, 0.0, 2.0, -1.0 - math.log(1.2))
    for chosen, masked in ((loss, 1), (replace(loss, sum_over_cp=add), 0)):
        sums = run(chosen, [[[token]]], "token_mean")[3]
        assert sums["rollout_corr/rollout_rs_masked_fraction"] == masked


def test_an_old_logprob_that_is_missing_is_the_policys_own() -> None:
    """NaN stands for groups that the present weights sampled, beside those that waited."""
    batch = batch_of()
    mixed = [[[replace(t, old=t.old if i else math.nan) for i, t in enumerate(r)] for r in g]
             for g in batch]  # fmt: skip
    filled = [[[replace(t, old=t.old if i else t.logprob) for i, t in enumerate(r)] for r in g]
              for g in batch]  # fmt: skip
    for loss in (PLAIN, changed(PLAIN, rollout_is_threshold=2.0)):
        found, want = (run(loss, b, "token_mean") for b in (mixed, filled))
        assert found[0] == want[0]
        assert torch.equal(found[1], want[1])
        assert found[3] == want[3]


def test_sums_for_the_metrics() -> None:
    loss, batch = changed(PLAIN, dual_clip=3.0, entropy_coef=0.5, kl_coef=0.5), batch_of()
    _, _, _, sums = run(loss, batch, "token_mean")
    tokens = tokens_of(batch)
    bare = changed(loss, entropy_coef=0.0, kl_coef=0.0)
    assert sums["actor/pg_loss"].item() == pytest.approx(brute_loss(batch, bare, "token_mean"))
    assert sums["actor/entropy"].item() == pytest.approx(sum(t.entropy for t in tokens))
    # An empty response counts as one of entropy 0.
    means = [np.mean([t.entropy for t in r] or [0.0]) for group in batch for r in group]
    assert sums["actor/response_entropy"].item() == pytest.approx(np.mean(means))
    assert sums["actor/ppo_kl"].item() == pytest.approx(sum(t.old - t.logprob for t in tokens))
    ratios = [(math.exp(t.logprob - t.old), t.advantage > 0) for t in tokens]
    clipped = [(r > 1.28 and good) or (r < 0.8 and not good) for r, good in ratios]
    assert sums["actor/pg_clipfrac"].item() == sum(clipped)
    assert sums["actor/pg_clipfrac_lower"].item() == sum(r > 3 and not g for r, g in ratios)
    kl = sum(math.exp(t.ref - t.logprob) - (t.ref - t.logprob) - 1 for t in tokens)
    assert sums["actor/kl_loss"].item() == pytest.approx(kl)
    assert not any(value.requires_grad for value in sums.values())


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize(
    ("num_ranks", "max_tokens", "share"), [(1, 99, True), (3, 9, True), (2, 8, False), (9, 8, True)]
)
def test_any_split_of_the_batch_adds_up_to_the_whole(
    aggregation: Any, num_ranks: int, max_tokens: int, share: bool
) -> None:
    loss, batch = SETTINGS["all"], batch_of()
    whole, want_grad, _, want_sums = run(loss, batch, aggregation)
    shares = make_rows(
        train_groups(batch),
        num_ranks=num_ranks,
        max_tokens=max_tokens,
        share_prompts=share,
        aggregation=aggregation,
        constant_tokens=MAX_TOKENS,
        cost=lambda prompt, responses: prompt + sum(responses),
    )
    tokens = tokens_of(batch)
    table = {f: column(tokens, f) for f in ("logprob", "entropy", "old", "ref", "engine")}
    total, pg_loss = 0.0, 0.0
    gradient = torch.zeros(len(tokens), dtype=torch.float64)
    rows = [row for rank in shares for row in rank]
    for row in rows:
        ranges = [r for block in row.blocks for r in block.responses]
        # token ids say which token of the batch lies here
        ids = torch.cat([torch.from_numpy(row.token_ids[a:b]).long() for a, b in ranges] or
                        [torch.zeros(0, dtype=torch.long)])  # fmt: skip
        logprobs = table["logprob"][ids].requires_grad_()
        columns = {name: torch.from_numpy(v).double() for name, v in row.columns.items()}
        columns |= {f"{name}_logprobs": table[name][ids] for name in ("old", "ref", "engine")}
        part, sums = loss(logprobs, table["entropy"][ids], columns)
        gradient[ids] += torch.autograd.grad(part, logprobs)[0]
        total += part.item()
        pg_loss += sums["actor/pg_loss"].item()
    # columns are float32 in a row
    assert total == pytest.approx(whole.item(), rel=1e-6)
    assert pg_loss == pytest.approx(want_sums["actor/pg_loss"].item(), rel=1e-6)
    torch.testing.assert_close(gradient, want_grad, rtol=1e-6, atol=1e-9)
    assert len(rows) >= min(num_ranks, 3)


def test_kl_estimators_by_hand() -> None:
    logprobs = torch.tensor([math.log(0.5), math.log(0.2)])
    ref = torch.tensor([math.log(0.25), math.log(0.4)])
    k1 = reference_kl(logprobs, ref, "k1")
    torch.testing.assert_close(k1, torch.tensor([math.log(2), -math.log(2)]))
    k3 = reference_kl(logprobs, ref, "k3")
    torch.testing.assert_close(k3, torch.tensor([0.5 - 1 + math.log(2), 2 - 1 - math.log(2)]))


def test_mismatch_of_trainer_and_engine() -> None:
    trainer = torch.tensor([0.5, 0.25]).log()
    engine = torch.tensor([0.25, 0.375]).log()
    found = mismatch(trainer, engine)
    assert found["training/rollout_probs_diff_mean"].item() == pytest.approx(0.25 + 0.125)
    logs = (math.log(2), math.log(1.5))
    assert found["training/rollout_logprobs_diff_mean"].item() == pytest.approx(sum(logs))
    assert found["training/rollout_logprobs_diff_max"].item() == pytest.approx(max(logs))
    assert found["training/rollout_probs_diff_max"].item() == pytest.approx(0.25)
    nothing = mismatch(torch.zeros(0), torch.zeros(0))
    assert [v.item() for v in nothing.values()] == [0, 0, 0, 0]


def test_empty_rank_gives_zero_with_a_gradient() -> None:
    """A rank without tokens still calls backward."""
    logprobs = torch.zeros(0, requires_grad=True)
    columns = {name: torch.from_numpy(values) for name, values in empty_row().columns.items()}
    total, _ = SETTINGS["all"](logprobs, logprobs * 1, columns)
    total.backward()
    assert total.item() == 0
    assert logprobs.grad is not None
    assert logprobs.grad.shape == (0,)


@pytest.mark.parametrize(
    ("aggregation", "want"),
    # responses of 1 and 3 tokens with -log p of 2 and (1, 2, 6)
    [("sequence_mean", (2 + 3) / 2), ("token_mean", 11 / 4)],
)
def test_sft_loss_is_the_mean_negative_log_likelihood(aggregation: Any, want: float) -> None:
    nll = [[2.0], [1.0, 2.0, 6.0]]
    groups = [
        TrainGroup(np.zeros(2, np.int32), (TrainResponse(np.zeros(len(n), np.int32), 1.0),))
        for n in nll
    ]
    weights = token_loss_weights(groups, aggregation, constant_tokens=1)
    logprobs = torch.tensor([-v for n in nll for v in n], requires_grad=True)
    flat = torch.tensor([w[0] for w, n in zip(weights, nll, strict=True) for _ in n])
    total, sums = sft_loss(logprobs, torch.full((4,), 0.5), {"loss_weights": flat})
    total.backward()
    assert total.item() == pytest.approx(want)
    torch.testing.assert_close(logprobs.grad, -flat)
    assert {k: v.item() for k, v in sums.items()} == {"sft/nll": 11.0, "actor/entropy": 2.0}
