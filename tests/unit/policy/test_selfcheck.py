"""The yardsticks of the first-use check: what a token sees, and attention by its definition."""

import numpy as np
import pytest
import torch

from megatron_qlrl.policy import selfcheck
from megatron_qlrl.policy.selfcheck import plain_attention, visible
from megatron_qlrl.types import Block, PackedRow

ROW = PackedRow(
    np.zeros(7, np.int32),
    np.zeros(7, np.int32),
    # a prompt of 2 tokens with responses of 1 and 2; then one of 1 with a response of 1
    (Block(0, (0, 1), (0, 2), ((2, 3), (3, 5))), Block(1, (0,), (5, 6), ((6, 7),))),
    {},
)


def mask() -> torch.Tensor:
    return visible(*(torch.from_numpy(x) for x in selfcheck._members(ROW)))


def test_a_token_sees_its_prompt_and_its_own_past() -> None:
    assert mask().int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value (4 heads on 2), and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(7, n, 5, generator=generator).to(dtype) for n in (4, 2, 2, 4)]


def test_plain_attention_equals_torch() -> None:
    query, key, value, grad = tensors(torch.float64)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    q, k, v = (x.transpose(0, 1) for x in leaves)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask(), scale=0.3, enable_gqa=True
    ).transpose(0, 1)
    expected = [out, *torch.autograd.grad(out, leaves, grad)]
    found = plain_attention(query, key, value, grad, mask=mask(), scale=0.3)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_its_noise_is_that_of_the_type(dtype: torch.dtype) -> None:
    inputs = tensors(dtype)
    found = plain_attention(*inputs, mask=mask(), scale=0.3)
    exact = plain_attention(*(x.double() for x in inputs), mask=mask(), scale=0.3)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype is dtype
        error = float((ours - theirs).norm() / theirs.norm())
        assert torch.finfo(dtype).eps / 10 < error < torch.finfo(dtype).eps * 2
