"""Chunked log-probs and entropy against torch.log_softmax on the whole logits."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_qlrl.policy.logprobs import token_logprobs
from tests.parity import Reference

VOCAB, PADDED, HIDDEN, NUM = 23, 32, 6, 17
TEMPERATURE = 0.7


def inputs(dtype: torch.dtype, num: int = NUM) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(num, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    weight[VOCAB:] *= 100  # padding that would take all probability if it counted
    targets = torch.randint(0, VOCAB, (num,), generator=generator)
    targets[:1], targets[-1:] = 0, VOCAB - 1
    return hidden.to(dtype), weight.to(dtype), targets


def dense(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = hidden @ weight[:VOCAB].t() / TEMPERATURE
    logp = logits.log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def results(function: Any, hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Log-probs, entropies and the gradients of both inputs for uneven incoming gradients."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = function(hidden, weight)
    n = len(logprobs)
    g_logprob, g_entropy = torch.linspace(-1, 2, n), torch.linspace(3, -1, n)
    total = (logprobs * g_logprob).sum() + (entropy * g_entropy).sum()
    return [logprobs, entropy, *torch.autograd.grad(total, [hidden, weight])]


@pytest.mark.parametrize("block", [(1, 1), (7, 5), (NUM, VOCAB), (NUM + 5, 100), (4, 100), None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_log_softmax(
    lone_group: dist.ProcessGroup, block: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    hidden, weight, targets = inputs(dtype)
    found = results(
        lambda h, w: token_logprobs(
            h, w, targets, temperature=TEMPERATURE, vocab_size=VOCAB, block=block,
            tp_group=lone_group,
        ),
        hidden,
        weight,
    )  # fmt: skip
    assert {t.dtype for t in found} == {dtype}
    exact = results(lambda h, w: dense(h, w, targets), hidden.double(), weight.double())
    if dtype == torch.float64:
        for mine, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    else:
        peer = results(lambda h, w: dense(h, w, targets), hidden, weight)
        for mine, theirs, other in zip(found, exact, peer, strict=True):
            Reference.of(theirs.detach(), other.detach()).check(mine.detach())
    assert torch.equal(found[3][VOCAB:], torch.zeros(PADDED - VOCAB, HIDDEN, dtype=dtype))


@pytest.mark.parametrize("only", [0, 1])
def test_gradient_of_one_output_alone(lone_group: dist.ProcessGroup, only: int) -> None:
    """The other output then has no gradient at all."""
    hidden, weight, targets = inputs(torch.float64)
    hidden.requires_grad_()
    mine = token_logprobs(
        hidden, weight, targets, temperature=TEMPERATURE, vocab_size=VOCAB, block=(4, 9),
        tp_group=lone_group,
    )  # fmt: skip
    (found,) = torch.autograd.grad(mine[only].sum(), hidden)
    (want,) = torch.autograd.grad(dense(hidden, weight, targets)[only].sum(), hidden)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_no_tokens(lone_group: dist.ProcessGroup) -> None:
    """A rank that predicts nothing still has (zero) gradients for its collectives."""
    hidden, weight, targets = inputs(torch.float32, num=0)
    logprobs, entropy, by_hidden, by_weight = results(
        lambda h, w: token_logprobs(
            h, w, targets, temperature=1.0, vocab_size=VOCAB, block=(4, 9), tp_group=lone_group
        ),
        hidden,
        weight,
    )
    assert logprobs.shape == entropy.shape == (0,)
    assert by_hidden.shape == (0, HIDDEN)
    assert torch.equal(by_weight, torch.zeros(PADDED, HIDDEN))


def test_by_hand(lone_group: dist.ProcessGroup) -> None:
    """Logits (0, log 3) at temperature 0.5 are (0, 2 log 3): probabilities 1/10 and 9/10."""
    weight = torch.tensor([[1.0], [3.0]]).log()
    logprobs, entropy = token_logprobs(
        torch.ones(2, 1), weight, torch.tensor([0, 1]), temperature=0.5, vocab_size=2,
        block=(8, 8), tp_group=lone_group,
    )  # fmt: skip
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.1, 0.9]))
    want = 0.325083  # -(0.1 log 0.1 + 0.9 log 0.9)
    torch.testing.assert_close(entropy, torch.full((2,), want))


def test_large_logits_stay_finite(lone_group: dist.ProcessGroup) -> None:
    """Logits of some 1e5: each position has one certain token, which is its target."""
    hidden, weight, _ = inputs(torch.float32)
    targets = (hidden @ weight[:VOCAB].t()).argmax(1)
    found = results(
        lambda h, w: token_logprobs(
            h, w, targets, temperature=TEMPERATURE, vocab_size=VOCAB, block=(4, 9),
            tp_group=lone_group,
        ),
        hidden * 1e4,
        weight,
    )  # fmt: skip
    assert all(value.isfinite().all() for value in found)
    assert torch.equal(found[0], torch.zeros(NUM))
    assert torch.equal(found[1], torch.zeros(NUM))


class _LargestOutput(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.sizes.append(value.numel())
        return out


def test_tokens_by_vocabulary_never_exists(lone_group: dist.ProcessGroup) -> None:
    num, block, vocab, width = 96, (32, 128), 512, 4
    hidden = torch.randn(num, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(0, vocab, (num,))
    with _LargestOutput() as forward:
        logprobs, entropy = token_logprobs(
            hidden, weight, targets, temperature=1.0, vocab_size=vocab, block=block,
            tp_group=lone_group,
        )  # fmt: skip
        total = (logprobs + entropy).sum()
    with _LargestOutput() as backward:
        total.backward()
    # Equal, not just at most: the recording saw the blocks of both directions. (The
    # weight itself has 2,048 elements.)
    assert max(forward.sizes) == 32 * 128
    assert max(backward.sizes) == 32 * 128
