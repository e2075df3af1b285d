"""The policy made of Transformer Engine's layers against that of Megatron's own, on real ranks with
the stand-in of tests/fakes/te, and what FP8 asks of a row, a step and a checkpoint."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from harness import rows_of, run_ranks, tiny_hf
from safetensors.torch import load_file
from test_policy_parity import LOSS, groups_of, policy_on
from test_selfcheck import sides

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.parallel.collectives import gather_objects
from megatron_qlrl.parallel.context import ParallelContext, init_parallel
from megatron_qlrl.policy import model as policy_model
from megatron_qlrl.policy.attention import SegmentAttention
from megatron_qlrl.policy.experts import CountingRouter
from megatron_qlrl.policy.policy import Policy
from megatron_qlrl.policy.selfcheck import check_sharing
from megatron_qlrl.types import PackedRow
from megatron_qlrl.weights.checkpoint import CheckpointStore, load_checkpoint, load_weights
from megatron_qlrl.weights.stream import WeightStream
from tests.parity import Reference, pooled

FAKES = Path(__file__).resolve().parents[1] / "fakes" / "te"
# Settings, Transformer Engine's recipe and format, rows of a block.
STEPS: list[tuple[dict[str, Any], tuple[str | None, str | None], int]] = [
    ({"recompute": "full"}, (None, None), 1),
    ({"recompute": "selective"}, (None, None), 1),
    ({"fp8": "hybrid", "fp8_recipe": "delayed", "recompute": "full"},
     ("DelayedScaling", "HYBRID"), 16),
    ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, ("Float8CurrentScaling", "HYBRID"), 16),
    ({"fp8": "e4m3", "fp8_recipe": "blockwise", "recompute": "full", "offload_activations": True},
     ("Float8BlockScaling", "E4M3"), 128),
    ({"fp8": "e4m3", "fp8_recipe": "mxfp8", "recompute": "selective"},
     ("MXFP8BlockScaling", "E4M3"), 32),
]  # fmt: skip


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Models are built of Transformer Engine's layers, in the way they are on a GPU."""
    with (
        patch.object(policy_model, "has_transformer_engine", lambda: True),
        patch.object(policy_model, "has_gpu", lambda: True),
    ):
        yield


def engine_policy(context: ParallelContext, folder: Path, **settings: Any) -> Policy:
    with as_on_a_gpu():
        return policy_on(context, folder, **settings)


def check_tree(policy: Policy) -> None:
    """Which class is where; norms that are fused into the layer behind them are identities."""
    nothing = "IdentityOp" if version("megatron-core").startswith("0.16.") else "NoneType"
    expected = {
        "input_layernorm": "IdentityOp",
        "self_attention.linear_qkv": "TELayerNormColumnParallelLinear",
        "self_attention.core_attention": "SegmentAttention",
        "self_attention.linear_proj": "TERowParallelLinear",
        "self_attention.q_layernorm": "RMSNorm" if policy.model_shape.qk_norm else nothing,
        "self_attention.k_layernorm": "RMSNorm" if policy.model_shape.qk_norm else nothing,
        "pre_mlp_layernorm": "IdentityOp",
        "mlp.linear_fc1": "TELayerNormColumnParallelLinear",
        "mlp.linear_fc2": "TERowParallelLinear",
    }
    for layer in policy.model.decoder.layers:
        found = {name: type(attrgetter(name)(layer)).__name__ for name in expected}
        assert found == expected
        assert isinstance(layer.self_attention.core_attention, SegmentAttention)
    norm = policy.model.decoder.final_layernorm
    if policy.context.is_last_stage:
        assert type(norm).__module__ == "transformer_engine.pytorch.module"


def streamed(policy: Policy, *, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Weights, or the gradients of the last update, by their Hugging Face names."""
    stream = WeightStream(
        policy.model, shape=policy.model_shape, context=policy.context, bucket_bytes=10**6
    )
    if gradients:
        stream._parameters = {n: p.main_grad for n, p in policy.model.named_parameters()}  # pyright: ignore
    return {name: tensor.clone() for name, tensor in stream}


class Pair:
    """Megatron's own layers in float64, which are exact, and in float32, which say how near float32
    is; and their weights after the first update."""

    def __init__(self, context: ParallelContext, folder: Path, peer: Policy) -> None:
        self.exact, self.peer = policy_on(context, folder, dtype=torch.float64), peer

    def check_logprobs(self, found: np.ndarray, rows: list[PackedRow]) -> None:
        exact = logprobs(self.exact, rows).astype(np.float64)
        Reference.of(exact, logprobs(self.peer, rows)).check(found, "log-probs")

    def update(self, rows: list[PackedRow]) -> float:
        """Both; the gradient norm in float64."""
        # Megatron clips no gradients in float64: that step is written out below.
        step(self.exact, rows, permit=lambda _: False)
        step(self.peer, rows)
        grads = streamed(self.exact, gradients=True)
        norm = float(torch.cat([g.flatten() for g in grads.values()]).norm())
        self.grads = {name: grad * min(1.0, 1 / (norm + 1e-6)) for name, grad in grads.items()}
        # AdamW's first step: both moments, corrected, are those of the gradient itself.
        self.weights = {
            name: weight * (1 - 1e-3 * 0.01 * (weight.dim() > 1))
            - 1e-3 * self.grads[name] / (self.grads[name].abs() + 1e-3)
            for name, weight in streamed(self.exact).items()
        }
        return norm

    def check_weights(self, ours: Policy) -> None:
        self._check(self.weights, streamed(self.peer), streamed(ours))

    def check_gradients(self, ours: Policy) -> None:
        self._check(self.grads, *(streamed(p, gradients=True) for p in (self.peer, ours)))

    def _check(self, exact: Any, peer: Any, ours: Any) -> None:
        bounds = Reference.of(pooled(exact, exact), pooled(peer, exact))
        bounds.check(pooled(ours, exact))


def logprobs(policy: Policy, rows: list[PackedRow]) -> np.ndarray:
    return np.concatenate([r.columns["now"] for r in policy.add_logprobs(rows, "now")])


def step(policy: Policy, rows: list[PackedRow], **settings: Any) -> float:
    return policy.update(rows, LOSS, lr=1e-3, **settings)["actor/grad_norm"]


def check_case(rank: int, case: tuple[Path, tuple[int, int, int]]) -> None:
    folder, (tp, pp, cp) = case
    context = init_parallel(tp=tp, pp=pp, cp=cp, seed=1)
    local, engine = policy_on(context, folder), engine_policy(context, folder)
    pair = Pair(context, folder, local)
    check_tree(engine)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(streamed(engine)[name], tensor), name
    rows = rows_of(groups_of(157), context)
    pair.check_logprobs(logprobs(engine, rows), rows)
    # Rounding changes a norm by a hundredth of this: errors of single gradients cancel.
    assert step(engine, rows) == pytest.approx(pair.update(rows), rel=1e-5)
    pair.check_gradients(engine)
    pair.check_weights(engine)
    if tp == 2 and not engine.model_shape.qk_norm:
        for settings, recipe, block in STEPS:
            policy = engine_policy(context, folder, **settings)
            check_step(policy, rows, recipe, block, pair)
            pair.check_weights(policy)
        check_self_check(engine_policy(context, folder, fp8="e4m3"))
    if pp == 2:
        check_checkpoint(context, folder, rows, local)
    if context.dp.size == 2:
        check_data_parallel_ranks_do_not_wait(context, folder, rows)


def check_step(
    policy: Policy,
    rows: list[PackedRow],
    recipe: tuple[str | None, str | None],
    block: int,
    pair: Pair,
) -> None:
    """Every product of a step runs under the recipe, on whole blocks of rows, also where it is
    computed again; and the weights that are kept in FP8 follow the update."""
    products = record()
    step(policy, rows)
    found = logprobs(policy, rows)
    assert {(p.recipe, p.format) for p in products} == {recipe}
    assert all(p.rows % block == 0 for p in products)
    policy.model.config.fp8 = None
    Reference.of(found.astype(np.float64), logprobs(pair.peer, rows)).check(logprobs(policy, rows))


def check_self_check(policy: Policy) -> None:
    """Sharing is compared without FP8, which is back afterwards."""
    products = record()
    check_sharing(policy, *sides())
    assert {p.recipe for p in products} == {None}
    step(policy, sides()[0])
    assert {p.recipe for p in products} == {None, "Float8BlockScaling"}


def check_data_parallel_ranks_do_not_wait(
    context: ParallelContext, folder: Path, rows: list[PackedRow]
) -> None:
    """Delayed scaling has a collective for each micro-batch."""
    counts = gather_objects(len(rows))
    assert counts[0] != counts[1]
    products = record()
    step(engine_policy(context, folder, fp8="hybrid", fp8_recipe="delayed"), rows)
    assert {p.ranks for p in products} == {(context.rank,)}


def record() -> list[Any]:
    """The products from here on."""
    from transformer_engine.pytorch import fp8

    fp8.PRODUCTS.clear()
    return fp8.PRODUCTS


def check_checkpoint(
    context: ParallelContext, folder: Path, rows: list[PackedRow], local: Policy
) -> None:
    """Checkpoints keep what delayed scaling needs of the layers' extra state, which is loaded only
    with the user's leave, go on bitwise, and fit other recipes and Megatron's own layers."""
    fp8: dict[str, Any] = {"fp8": "hybrid", "fp8_recipe": "delayed", "distributed_optimizer": True}
    first, second = (engine_policy(context, folder, **fp8) for _ in range(2))
    store = CheckpointStore(folder / f"pp{context.pp.size}", keep=9, warn=print)

    def save(number: int, policy: Policy) -> Path:
        path = store.save(number, model=policy.model, optimizer=policy.optimizer, state={})
        store.wait()
        return path

    def load(path: Path, policy: Policy) -> None:
        load_checkpoint(path, model=policy.model, optimizer=policy.optimizer)

    load(save(0, first), second)  # nothing has been updated yet
    assert [step(first, rows) for _ in range(2)] == [step(second, rows) for _ in range(2)]
    third = engine_policy(context, folder, **fp8)
    path = save(2, first)
    with pytest.raises(CheckpointError, match="set NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1 in"):
        load(path, third)
    with patch.dict(os.environ, {"NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "1"}):
        load(path, third)
    extra = "decoder.layers.0.mlp.linear_fc2._extra_state"
    assert first.model.state_dict()[extra].numel() > 0
    assert torch.equal(third.model.state_dict()[extra], first.model.state_dict()[extra])
    assert step(third, rows) == step(first, rows)
    for name, tensor in streamed(first).items():
        assert torch.equal(streamed(third)[name], tensor), name
    blockwise = engine_policy(context, folder, fp8="e4m3", distributed_optimizer=True)
    load(path, blockwise)
    assert blockwise.model.state_dict()[extra].numel() == 0
    load_weights(save(3, third), model=local.model)  # as for an export without a GPU
    for name, tensor in streamed(local).items():
        assert torch.equal(streamed(third)[name], tensor), name


def test_equals_megatrons_own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FAKES)  # spawned ranks get this process' path
    biased, normed = (tiny_hf(tmp_path / kind, kind) for kind in ("qwen2", "qwen3"))
    layouts = [(biased, (2, 1, 1)), (normed, (2, 1, 1)), (biased, (1, 2, 1)), (normed, (1, 1, 1))]
    run_ranks(check_case, 2, layouts, fresh=True)


def check_experts(rank: int, case: tuple[Path, tuple[int, int, int], int]) -> None:
    """In float64, where both compute the same but for the order of sums: weights, log-probs,
    gradients and their norm; and Megatron's own layers read what the others have saved."""
    folder, (tp, pp, cp), ep = case
    context = init_parallel(tp=tp, pp=pp, cp=cp, ep=ep, seed=1)
    local = policy_on(context, folder, dtype=torch.float64, ep=ep)
    engine = engine_policy(context, folder, dtype=torch.float64, ep=ep)
    layer = engine.model.decoder.layers[0]
    assert type(layer.mlp.experts).__name__ == "TEGroupedMLP"
    assert type(layer.mlp.router) is CountingRouter
    assert type(layer.pre_mlp_layernorm).__name__ == "RMSNorm"
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(streamed(engine)[name].float(), tensor), name
    rows = rows_of(groups_of(157), context)
    np.testing.assert_allclose(logprobs(engine, rows), logprobs(local, rows), rtol=1e-6)
    norms = [step(policy, rows, permit=lambda _: False) for policy in (engine, local)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-7)
    grads = [streamed(policy, gradients=True) for policy in (engine, local)]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-6, atol=1e-9, msg=name)
    store = CheckpointStore(folder / f"tp{tp}ep{ep}", keep=9, warn=print)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.add_(1)
    path = store.save(1, model=engine.model, optimizer=engine.optimizer, state={})
    store.wait()
    load_weights(path, model=local.model)  # as for an export without a GPU
    for name, tensor in streamed(engine).items():
        assert torch.equal(streamed(local)[name], tensor), name


def test_grouped_experts_equal_megatrons_own_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FAKES)
    folder = tiny_hf(tmp_path, "qwen3_moe")
    layouts = [((1, 1, 1), 1), ((1, 1, 1), 2), ((2, 1, 1), 2), ((2, 1, 1), 1)]
    run_ranks(check_experts, 2, [(folder, *layout) for layout in layouts], fresh=True)
