"""The gradient norm, and so the clipping, is the same for every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import rows_of, run_ranks, tiny_hf

from megatron_qlrl.config.schema import OptimizerConfig, PolicyConfig
from megatron_qlrl.config.shape import read_shape
from megatron_qlrl.packing.shard import shard_row
from megatron_qlrl.parallel.context import init_parallel
from megatron_qlrl.policy.loss import sft_loss
from megatron_qlrl.policy.policy import Policy
from megatron_qlrl.types import TrainGroup, TrainResponse
from megatron_qlrl.weights.stream import load_hf
from tests.parity import Reference, transformers_model

# (tp, pp, cp); data parallelism takes the rest of the ranks.
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)]
VOCAB = 157


def groups() -> list[TrainGroup]:
    rng = np.random.default_rng(5)

    def tokens(n: int) -> np.ndarray:
        return rng.integers(0, VOCAB, n).astype(np.int32)

    return [TrainGroup(tokens(9 + i), (TrainResponse(tokens(4 + i), 1.0),)) for i in range(4)]


def reference(folder: Path) -> Reference:
    """transformers' gradient of the mean negative log-probability of the response tokens."""
    exact, peer = (transformers_gradient(folder, d) for d in (torch.float64, torch.float32))
    return Reference.of(exact, peer)


def transformers_gradient(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    net = transformers_model(folder, dtype)
    losses = []
    for group in groups():
        response = torch.from_numpy(np.asarray(group.responses[0].token_ids)).long()
        ids = torch.cat([torch.from_numpy(np.asarray(group.prompt_ids)).long(), response])
        logits = net(ids[None]).logits[0, -len(response) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, response, reduction="none"))
    torch.cat(losses).mean().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def check_case(rank: int, case: tuple[Path, tuple[int, int, int], int, bool, Reference]) -> None:
    folder, (tp, pp, cp), ep, distributed, expected = case
    context = init_parallel(tp=tp, pp=pp, cp=cp, ep=ep, seed=1)
    shape = read_shape(folder, rope_scaling=None)
    settings: dict[str, Any] = {"tp": tp, "pp": pp, "cp": cp, "ep": ep}
    policy = Policy(
        shape,
        config=PolicyConfig.model_validate(settings | {"distributed_optimizer": distributed}),
        optimizer_config=OptimizerConfig.model_validate({}),
        dtype=torch.float32,
        temperature=1.0,
        context=context,
        shard=lambda row: shard_row(
            row, cp_size=context.cp.size, cp_rank=context.cp.rank, multiple_of=tp if tp > 1 else 1
        ),
        load=lambda model: load_hf(folder, model, shape=shape, context=context),
    )
    rows = rows_of(groups(), context)
    found = policy.update(rows, sft_loss, lr=1e-3)["actor/grad_norm"]
    expected.check_norm(found, (folder.name, tp, pp, cp, ep, distributed))


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradient_norm_equals_transformers(tmp_path: Path, world_size: int) -> None:
    cases = []
    for kind, settings, ep_sizes in (
        ("qwen2", {}, (1,)),
        ("qwen2", {"tie_word_embeddings": True}, (1,)),
        ("qwen3_moe", {}, (1, 2)),
    ):
        folder = tiny_hf(tmp_path / f"{kind}{len(settings)}", kind, **settings)
        expected = reference(folder)
        cases += [
            (folder, layout, ep, distributed, expected)
            for layout in LAYOUTS
            for ep in ep_sizes
            for distributed in (False, True)
            if world_size % int(np.prod(layout)) == 0 and world_size // layout[1] % ep == 0
        ]
    run_ranks(check_case, world_size, cases)
