"""The probe of the weights in every layout; transformers stands in for the engines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks, tiny_hf
from test_policy_parity import TEMPERATURE, make_policy

from megatron_qlrl.errors import SyncError
from megatron_qlrl.train.probe import WeightProbe
from megatron_qlrl.types import ProbeAnswer
from tests.parity import transformers_model


def answer_of(net: Any, probe: WeightProbe) -> ProbeAnswer:
    ids = torch.from_numpy(probe.prompt_ids).long()
    with torch.no_grad():
        for _ in range(probe.num_tokens):
            ids = torch.cat([ids, net(ids[None]).logits[0, -1:].argmax(-1)])
        logprobs = net(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return ProbeAnswer(ids.numpy().astype(np.int32), logprobs.numpy(), len(probe.prompt_ids))


def check(rank: int, case: tuple[Path, tuple[int, int, int], int]) -> None:
    """Each rank leads an engine; that of the last one has a square matrix transposed."""
    folder, layout, world_size = case
    policy, _ = make_policy(folder, layout)
    probe = WeightProbe(policy, max_tokens=100)
    before = [p.detach().clone() for p in policy.model.parameters()]
    net = transformers_model(folder, torch.float32)
    metrics = probe.check(answer_of(net, probe))
    assert metrics.keys() == {"training/probe_prefill_error", "training/probe_decode_error"}
    assert all(0 < error < 4 for error in metrics.values()), metrics
    matrix = net.model.layers[1].self_attn.o_proj.weight
    assert matrix.shape[0] == matrix.shape[1]
    if rank == world_size - 1:
        matrix.data = matrix.data.t().contiguous()
    with pytest.raises(SyncError, match=f"engine {world_size - 1} does not have the trainer's"):
        probe.check(answer_of(net, probe))
    assert policy.temperature == TEMPERATURE
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_probe(tmp_path: Path, world_size: int) -> None:
    folder = tiny_hf(tmp_path / "model", "qwen2")
    layouts = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
    fitting = [x for x in layouts if world_size % int(np.prod(x)) == 0]
    run_ranks(check, world_size, [(folder, layout, world_size) for layout in fitting])
