"""Megatron against transformers: log-probs, entropies and gradients for every layout."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import rows_of, run_ranks, tiny_hf

from megatron_qlrl.config.schema import AlgorithmConfig, OptimizerConfig, PolicyConfig
from megatron_qlrl.config.shape import read_shape
from megatron_qlrl.packing.shard import shard_row
from megatron_qlrl.parallel.collectives import gather_dicts
from megatron_qlrl.parallel.context import ParallelContext, init_parallel
from megatron_qlrl.policy.loss import PolicyLoss
from megatron_qlrl.policy.policy import Policy
from megatron_qlrl.types import PackedRow, TrainGroup, TrainResponse
from megatron_qlrl.weights.stream import WeightStream, load_hf
from tests.parity import Reference, gradients, pooled, transformers_model

TEMPERATURE = 0.7
LOSS = PolicyLoss(
    AlgorithmConfig.model_validate({"dual_clip": 3.0, "kl_coef": 0.1, "entropy_coef": 0.01})
)
# (tp, pp, cp); data parallelism takes the rest of the ranks.
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]


def groups_of(vocab: int) -> list[TrainGroup]:
    """Odd shapes: prompts of 1, 2 and 23 tokens; responses of 0, 1, 2 ... tokens; a group of 1."""
    rng = np.random.default_rng(3)

    def response(n: int) -> TrainResponse:
        engine = rng.normal(-3, 0.5, n).astype(np.float32)
        tokens = rng.integers(0, vocab, n).astype(np.int32)
        return TrainResponse(tokens, float(rng.normal()), engine)

    def group(prompt: int, lengths: Sequence[int]) -> TrainGroup:
        ids = rng.integers(0, vocab, prompt).astype(np.int32)
        return TrainGroup(ids, tuple(response(n) for n in lengths))

    return [
        group(23, [5, 1, 12, 3]),
        group(1, [2, 1]),
        group(2, [7]),
        group(16, [0, 4, 9]),
        group(9, [31, 2]),
    ]


def reference(folder: Path) -> dict[Any, Any]:
    """`groups`, and the bounds on the values of a policy in float32 and in float64. In float64 only
    the columns of the rows are float32, so that the errors are those of rounding a result once."""
    groups = groups_of(157)
    near = iter(transformers_values(folder, groups, torch.float64)["logprobs"])
    groups = [
        replace(group, responses=tuple(near_policy(r, near) for r in group.responses))
        for group in groups
    ]
    exact, peer = (transformers_values(folder, groups, d) for d in (torch.float64, torch.float32))
    rounded = {name: value.astype(np.float32) for name, value in exact.items()}
    return {
        "groups": groups,
        torch.float32: Bounds.of(exact, peer),
        torch.float64: Bounds.of(exact, rounded),
    }


@dataclass(frozen=True)
class Bounds:
    """`grads` is of all gradients together, in units of the `exact` ones."""

    logprobs: Reference
    entropies: Reference
    grads: Reference
    exact: dict[str, np.ndarray]

    @classmethod
    def of(cls, exact: dict[str, np.ndarray], peer: dict[str, np.ndarray]) -> "Bounds":
        logprobs, entropies = (
            Reference.of(exact[name], peer[name]) for name in ("logprobs", "entropies")
        )
        exact, peer = ({n: v for n, v in d.items() if "." in n} for d in (exact, peer))
        grads = Reference.of(pooled(exact, exact), pooled(peer, exact))
        return cls(logprobs, entropies, grads, exact)


def near_policy(response: TrainResponse, logprobs: Iterator[float]) -> TrainResponse:
    """The response with engine log-probs some 0.3 from the policy's own, the next of `logprobs`:
    far from them k3 multiplies the rounding of single tokens, and hides what else differs."""
    own = np.array([next(logprobs) for _ in response.token_ids])
    noise = np.random.default_rng(len(own)).normal(0, 0.3, len(own))
    return replace(response, engine_logprobs=(own + noise).astype(np.float32))


def transformers_values(
    folder: Path, groups: list[TrainGroup], dtype: torch.dtype
) -> dict[str, np.ndarray]:
    """One response at a time, the loss written out again from the paper: log-probs and entropies
    of all groups' responses one after another, and the gradient of each weight by its name."""
    net = transformers_model(folder, dtype)
    num_tokens = sum(len(r.token_ids) for g in groups for r in g.responses)
    logprobs, entropies = [], []
    for group in groups:
        for response in group.responses:
            n = len(response.token_ids)
            if n == 0:
                continue
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, response.token_ids])).long()
            logits = net(ids[None]).logits[0, -n - 1 : -1] / TEMPERATURE
            logp = logits.log_softmax(-1)
            picked = logp.gather(1, ids[-n:, None])[:, 0]
            entropy = -(logp.exp() * logp).sum(-1)
            ratio = (picked - picked.detach()).exp()
            engine = torch.from_numpy(np.asarray(response.engine_logprobs))
            delta = picked - engine  # the engine's column stands for the reference here
            kl = (-delta).exp() - 1 + delta
            loss = -ratio * response.advantage - 0.01 * entropy + 0.1 * kl
            (loss.sum() / num_tokens).backward()
            logprobs.append(picked.detach().numpy())
            entropies.append(entropy.detach().numpy())
    return {
        "logprobs": np.concatenate(logprobs),
        "entropies": np.concatenate(entropies),
        **gradients(net),
    }


def make_policy(
    folder: Path, layout: tuple[int, int, int], **settings: Any
) -> tuple[Policy, ParallelContext]:
    tp, pp, cp = layout
    context = init_parallel(tp=tp, pp=pp, cp=cp, ep=settings.get("ep", 1), seed=1)
    return policy_on(context, folder, **settings), context


def policy_on(
    context: ParallelContext,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    block: int = 1,
    offload_optimizer: bool = False,
    configured_rate: float = 1e-3,
    **settings: Any,
) -> Policy:
    """`block`: the tokens on a rank are padded to a multiple of it, as FP8 needs it."""
    tp, pp, cp = context.tp.size, context.pp.size, context.cp.size
    shape = read_shape(folder, rope_scaling=None)
    settings = {"distributed_optimizer": False} | settings
    config = PolicyConfig(tp=tp, pp=pp, cp=cp, **settings)
    return Policy(
        shape,
        config=config,
        # A large eps: Adam must not blow rounding noise of tiny gradients up to full steps.
        optimizer_config=OptimizerConfig(  # pyright: ignore[reportCallIssue]
            lr=configured_rate, eps=1e-3, offload=offload_optimizer
        ),
        dtype=dtype,
        temperature=TEMPERATURE,
        context=context,
        shard=lambda row: shard_row(
            row, cp_size=cp, cp_rank=context.cp.rank, multiple_of=config.tokens_multiple * block
        ),
        load=lambda model: load_hf(folder, model, shape=shape, context=context),
    )


def check_layout(
    rank: int, folder: Path, layout: tuple[int, int, int], expected: Any, settings: dict[str, Any]
) -> None:
    packing = settings.pop("packing", {})
    bounds: Bounds = expected[settings.get("dtype", torch.float32)]
    policy, context = make_policy(folder, layout, **settings)
    rows = rows_of(expected["groups"], context, **packing)
    rows = policy.add_logprobs(rows, "logprobs")
    bounds.logprobs.check(batch_logprobs(expected["groups"], rows), "log-probs")

    rows = [
        replace(
            row, columns={**row.columns, "ref_logprobs": row.columns.get("engine_logprobs",
                np.zeros(row.num_response_tokens, np.float32))}
        )
        for row in rows
    ]  # fmt: skip
    # Without the step, gradients and weights stay as they are.
    metrics = policy.update(rows, LOSS, lr=1e-3, permit=lambda _: False)
    bounds.entropies.check_mean(metrics["actor/entropy"], "entropy")

    stream = WeightStream(
        policy.model, shape=policy.model_shape, context=context, bucket_bytes=20_000
    )
    stream._parameters = {n: p.main_grad for n, p in policy.model.named_parameters()}
    grads = {name: grad.numpy().copy() for name, grad in stream}
    bounds.grads.check(pooled(grads, bounds.exact), "gradients")


def batch_logprobs(groups: list[TrainGroup], rows: list[PackedRow]) -> np.ndarray:
    """All ranks' column "logprobs", in the order of the groups and their responses."""
    here: dict[tuple[int, int], np.ndarray] = {}
    for row in rows:
        at = 0
        for block in row.blocks:
            for sample, (start, end) in zip(block.samples, block.responses, strict=True):
                here[block.group, sample] = row.columns["logprobs"][at : at + end - start]
                at += end - start
        assert at == len(row.columns["logprobs"])
    parts = gather_dicts(here)
    return np.concatenate(
        [parts[i, k] for i, group in enumerate(groups) for k in range(len(group.responses))]
    )


def check_case(rank: int, case: tuple[Path, tuple[int, int, int], Any, dict[str, Any]]) -> None:
    folder, layout, expected, settings = case
    try:
        check_layout(rank, folder, layout, expected, dict(settings))
    except AssertionError as error:
        raise AssertionError(f"layout {layout}, {folder.name}, {settings}: {error}") from error


MODELS = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "llama-yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0,
                             "original_max_position_embeddings": 32}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_logprobs_and_gradients_equal_transformers(tmp_path: Path, world_size: int) -> None:
    cases = []
    for label, (kind, overrides) in MODELS.items():
        folder = tiny_hf(tmp_path / label, kind, **overrides)
        expected = reference(folder)
        for layout in LAYOUTS:
            if world_size % int(np.prod(layout)) == 0:
                cases.append((folder, layout, expected, {}))
                if label == "qwen2":
                    cases += [(folder, layout, expected, s) for s in VARIANTS]
    run_ranks(check_case, world_size, cases)


VARIANTS: list[dict[str, Any]] = [
    {"dtype": torch.float64, **settings}
    for settings in (
        {},
        {"packing": {"share_prompts": False}},
        {"packing": {"max_tokens": 42}},  # groups divided over rows
        {"packing": {"max_tokens": 1000}, "recompute": "full"},
        {"recompute": "selective"},
        {"sequence_parallel": False},
        {"block": 16},
    )
]
