"""A mixture of experts (Qwen3-MoE) against transformers in every layout, and what expert parallel
ranks must agree on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import rows_of, run_ranks, tiny_hf
from safetensors.torch import load_file
from test_policy_parity import check_case, groups_of, make_policy, reference

from megatron_qlrl.config.schema import AlgorithmConfig
from megatron_qlrl.parallel.collectives import gather_objects
from megatron_qlrl.policy.loss import PolicyLoss
from megatron_qlrl.weights.stream import WeightStream

PLAIN = PolicyLoss(AlgorithmConfig.model_validate({}))

# (tp, pp, cp) and policy.ep; data parallelism takes the rest of the ranks.
LAYOUTS: list[tuple[tuple[int, int, int], int]] = [
    ((1, 1, 1), 1),
    ((2, 1, 1), 1),
    ((1, 2, 1), 1),
    ((1, 1, 2), 1),
    ((1, 1, 1), 2),  # ranks with different rows divide the experts
    ((2, 1, 1), 2),  # the ranks of one row do
    ((1, 1, 2), 2),
    ((2, 1, 1), 4),
    ((1, 2, 1), 2),
    ((2, 2, 1), 2),
    ((1, 2, 2), 1),
    ((2, 2, 1), 4),  # of 8 ranks: four divide the experts of a stage, among two rows
]


def tiny_moe(folder: Path, **overrides: Any) -> Path:
    return tiny_hf(folder, "qwen3_moe", hidden_size=64, num_hidden_layers=4, **overrides)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_logprobs_and_gradients_equal_transformers(tmp_path: Path, world_size: int) -> None:
    folder = tiny_moe(tmp_path / "normalised")
    unnormalised = tiny_moe(tmp_path / "unnormalised", norm_topk_prob=False)
    expected = reference(folder)
    cases = [
        (folder, layout, expected, {"ep": ep})
        for layout, ep in LAYOUTS
        if world_size % int(np.prod(layout)) == 0 and world_size // layout[1] % ep == 0
        if world_size < 8 or (layout, ep) == LAYOUTS[-1]
    ]
    if world_size == 1:
        cases.append((unnormalised, (1, 1, 1), reference(unnormalised), {}))
        cases += [(folder, (1, 1, 1), expected, settings) for settings in VARIANTS]
    run_ranks(check_case, world_size, cases)


VARIANTS: list[dict[str, Any]] = [
    {"packing": {"share_prompts": False}},
    {"packing": {"max_tokens": 42}},  # groups divided over rows
    {"recompute": "full"},
    {"recompute": "full", "offload_activations": True},
    {"recompute": "selective"},
]


def check_stream(rank: int, case: tuple[Path, tuple[int, int, int], int]) -> None:
    """Hugging Face -> Megatron -> Hugging Face, for a release and for engines of 1 and 2 ranks."""
    folder, (tp, pp, cp), ep = case
    right = load_file(folder / "model.safetensors")
    policy, context = make_policy(folder, (tp, pp, cp), ep=ep)
    for bucket_bytes in (1000, 50_000):
        stream = WeightStream(
            policy.model, shape=policy.model_shape, context=context, bucket_bytes=bucket_bytes
        )
        for name, tensor in {n: t.clone() for n, t in stream}.items():
            assert torch.equal(tensor, right[name]), (name, tp, pp, cp, ep)
        for engine in (1, 2):
            sent = {name: tensor.clone() for name, tensor in stream.for_engine(engine)}
            assert sent.keys() == right.keys()
            for name in (name for name in sent if ".experts." in name):
                assert torch.equal(sent[name], right[name]), (name, tp, pp, cp, ep, engine)


@pytest.mark.parametrize("world_size", [2, 4])
def test_weights_come_back_bit_exact(tmp_path: Path, world_size: int) -> None:
    folder = tiny_moe(tmp_path)
    layouts = [((2, 1, 1), 2), ((1, 1, 1), world_size), ((1, 2, 1), world_size // 2)]
    run_ranks(check_stream, world_size, [(folder, layout, ep) for layout, ep in layouts])


def check_balance(rank: int, folder: Path) -> None:
    """Equal logits choose the same expert for each token: the busiest of 8 has 8 times the mean."""
    policy, context = make_policy(folder, (1, 1, 1), ep=2, recompute="full")
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "router" in name:
                parameter.zero_()
    rows = rows_of(groups_of(157), context)
    numbers = gather_objects(len(rows))
    assert len(set(numbers)) > 1, "the ranks must have different numbers of rows"
    policy.add_logprobs(rows, "old_logprobs")  # passes without a gradient do not count
    metrics = policy.update(rows, PLAIN, lr=0.0)
    idle = max(numbers) - len(rows)
    tokens = sum(row.num_tokens for row in rows) + idle
    for layer in policy.model.decoder.layers:
        assert float(torch.as_tensor(layer.mlp.router.tokens).sum()) == tokens
    assert metrics["actor/expert_load_max_over_mean"] == 8
    assert metrics["actor/expert_idle_fraction"] == 7 / 8


def test_balance_is_counted_once_for_each_token(tmp_path: Path) -> None:
    folder = tiny_moe(tmp_path, num_experts_per_tok=1, norm_topk_prob=False)
    run_ranks(check_balance, 2, [folder])
