"""The first-use check passes on sound kernels in every layout, type, depth and kind of head,
changes nothing, and names the layer of a kernel that is wrong in one direction."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks, tiny_hf
from test_policy_parity import TEMPERATURE, groups_of, make_policy, policy_on

from megatron_qlrl.errors import KernelError
from megatron_qlrl.packing.distribute import group_rows
from megatron_qlrl.packing.rows import slice_group
from megatron_qlrl.parallel.context import init_parallel
from megatron_qlrl.policy.kernels import AtenCpu
from megatron_qlrl.policy.policy import Policy
from megatron_qlrl.policy.selfcheck import check_sharing
from megatron_qlrl.types import PackedRow, TrainGroup, TrainResponse


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


def both_sides(group: TrainGroup, *, max_tokens: int) -> tuple[list[PackedRow], list[PackedRow]]:
    shared, separate = (
        group_rows(group, max_tokens=max_tokens, share_prompt=share, cost=lambda p, r: 1.0)
        for share in (True, False)
    )
    return shared, separate


def sides() -> tuple[list[PackedRow], list[PackedRow]]:
    group = slice_group(groups_of(157)[0], prompt_tokens=20, responses=3, response_tokens=9)
    shared, separate = both_sides(group, max_tokens=60)
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
    assert 0.1 < check_sharing(policy, *sides()) < 3
    assert all(torch.equal(a, b) for a, b in zip(sound, policy.model.parameters(), strict=True))
    assert all(not p.main_grad.any() for p in policy.model.parameters())
    assert policy.version == 0
    shared, separate = sides()
    moved = [
        replace(row, position_ids=row.position_ids + (row.position_ids >= 20)) for row in shared
    ]
    with pytest.raises(KernelError, match="the input of layer 1 with shared prompts is off"):
        check_sharing(policy, moved, separate)
    # Under context parallelism a separate row is made of pieces that are not causal, too.
    side = "separate rows" if context.cp.size > 1 else "shared prompts"
    name_broken_layer(policy, *sides(), number=2, side=side)


def name_broken_layer(
    policy: Policy,
    shared: list[PackedRow],
    separate: list[PackedRow],
    *,
    number: int,
    side: str = "shared prompts",
) -> None:
    for kernel, what in (
        (WrongForward(), f"output of layer {number}"),
        (NotANumber(), f"output of layer {number}"),
        (WrongBackward(), rf"gradient \(keys\) of layer {number}"),
    ):
        break_layer(policy, number, kernel)
        with pytest.raises(KernelError, match=f"the {what} with {side} is off"):
            check_sharing(policy, shared, separate)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_self_check(tmp_path: Path, world_size: int) -> None:
    folder = tiny_hf(tmp_path / "model", "qwen2", num_hidden_layers=4)
    layouts = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
    fitting = [x for x in layouts if world_size % int(np.prod(x)) == 0]
    run_ranks(check, world_size, [(folder, layout) for layout in fitting])


def sampled_group(folder: Path, *, peak: float) -> tuple[TrainGroup, float]:
    """Scales the model's head by `peak`; a prompt of 40 tokens with three responses of 32 that the
    model sampled itself, and how many nats a token of theirs has."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, 157, (40,), generator=generator)
    ids, nats = prompt.repeat(3, 1), []
    with torch.no_grad():
        net.lm_head.weight.mul_(peak)
        for _ in range(32):
            logp = (net(ids).logits[:, -1] / TEMPERATURE).log_softmax(-1)
            chosen = torch.multinomial(logp.exp(), 1, generator=generator)
            nats.append(-logp.gather(1, chosen))
            ids = torch.cat([ids, chosen], 1)
    net.save_pretrained(folder)
    responses = tuple(TrainResponse(r.numpy().astype(np.int32), 1.0) for r in ids[:, 40:])
    return TrainGroup(prompt.numpy().astype(np.int32), responses), float(torch.cat(nats).mean())


def check_deep(rank: int, case: tuple[Path, TrainGroup, torch.dtype, bool]) -> None:
    folder, group, dtype, break_a_layer = case
    policy = policy_on(init_parallel(tp=1, pp=1, cp=1, seed=1), folder, dtype=dtype)
    rows = both_sides(group, max_tokens=200)
    assert check_sharing(policy, *rows) < 3
    if break_a_layer:
        name_broken_layer(policy, *rows, number=policy.model_shape.num_layers // 2)


@pytest.mark.parametrize("depth", [2, 28, 48])
def test_depth_and_head_do_not_matter(tmp_path: Path, depth: int) -> None:
    """The gradients of the sound bfloat16 models of 28 and 48 layers with a peaked head differ by
    0.2 and 0.6 between shared prompts and separate rows, from end to end."""
    cases = []
    for head, peak, least, most in (("random", 1.0, 2.0, 5.0), ("peaked", 3.5, 0.3, 1.3)):
        folder = tiny_hf(tmp_path / head, "qwen2", num_hidden_layers=depth)
        group, nats = sampled_group(folder, peak=peak)
        assert least < nats < most, nats
        cases += [
            (folder, group, torch.bfloat16, depth == 2 or head == "peaked"),
            (folder, group, torch.float32, depth == 2),
        ]
    run_ranks(check_deep, 1, cases)
