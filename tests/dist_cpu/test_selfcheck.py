"""The first-use check passes on sound kernels in every layout, changes nothing, and names the
layer of a kernel that is wrong in one direction."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks, tiny_hf
from test_policy_parity import groups_of, make_policy

from megatron_qlrl.errors import KernelError
from megatron_qlrl.packing.microbatch import group_rows
from megatron_qlrl.packing.rows import slice_group
from megatron_qlrl.policy.kernels import AtenCpu
from megatron_qlrl.policy.selfcheck import check_sharing
from megatron_qlrl.policy.step import Policy
from megatron_qlrl.types import PackedRow


class WrongForward(AtenCpu):
    """Pieces that are not causal report a log-sum-exp that is too high."""

    def forward(self, q: Any, k: Any, v: Any, causal: bool, scale: float) -> Any:
        out, lse = super().forward(q, k, v, causal, scale)
        return out, lse if causal else lse + 0.5


class WrongBackward(AtenCpu):
    """Pieces that are not causal lose half of the keys' gradient."""

    def backward(self, *args: Any) -> Any:
        dq, dk, dv = super().backward(*args)
        causal = args[6]
        return dq, dk if causal else dk / 2, dv


class NotANumber(AtenCpu):
    def forward(self, q: Any, k: Any, v: Any, causal: bool, scale: float) -> Any:
        out, lse = super().forward(q, k, v, causal, scale)
        return out if causal else out * float("nan"), lse


def sides() -> tuple[list[PackedRow], list[PackedRow]]:
    group = slice_group(groups_of(157)[0], prompt_tokens=20, responses=3, response_tokens=9)
    shared, separate = (
        group_rows(group, max_tokens=60, share_prompt=share, cost=lambda prompt, responses: 1.0)
        for share in (True, False)
    )
    assert (len(shared[0].blocks[0].responses), len(separate[0].blocks[0].responses)) == (3, 1)
    return shared, separate


def break_layer(policy: Policy, number: int, kernel: AtenCpu) -> None:
    for layer in policy.model.decoder.layers:
        if layer.layer_number == number:
            layer.self_attention.core_attention.kernel = kernel


def check(rank: int, case: tuple[Path, tuple[int, int, int]]) -> None:
    folder, layout = case
    policy, context = make_policy(folder, layout)
    sound = [p.detach().clone() for p in policy.model.parameters()]
    check_sharing(policy, *sides())
    assert all(torch.equal(a, b) for a, b in zip(sound, policy.model.parameters(), strict=True))
    assert all(not p.main_grad.any() for p in policy.model.parameters())
    assert policy.version == 0
    assert policy.model.config.finalize_model_grads_func is not None
    for kernel, what in (
        (WrongForward(), "output of layer 2"),
        (NotANumber(), "output of layer 2"),
        (WrongBackward(), "gradient of layer 2"),
    ):
        break_layer(policy, 2, kernel)
        with pytest.raises(KernelError, match=f"the {what} with shared prompts"):
            check_sharing(policy, *sides())
    break_layer(policy, 2, AtenCpu())
    break_layer(policy, 1, WrongBackward())
    with pytest.raises(KernelError, match="gradient of layer 1 "):
        check_sharing(policy, *sides())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_self_check(tmp_path: Path, world_size: int) -> None:
    folder = tiny_hf(tmp_path / "model", "qwen2", num_hidden_layers=4)
    layouts = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
    fitting = [x for x in layouts if world_size % int(np.prod(x)) == 0]
    run_ranks(check, world_size, [(folder, layout) for layout in fitting])
