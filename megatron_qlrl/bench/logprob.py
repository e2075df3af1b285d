"""Measures log-probs and entropies of response tokens, forward and backward, computed in blocks,
against full logits (matmul, log_softmax, gather, entropy, by autograd)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_qlrl.bench.measure import compare, measure, report
from megatron_qlrl.parallel.context import process_group
from megatron_qlrl.platform.device import device, has_gpu
from megatron_qlrl.platform.env import init_ranks
from megatron_qlrl.policy.logprobs import token_logprobs

_TEMPERATURE = 0.7
_ERROR_TOKENS = 256
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def bench_logprob(*, vocab: int, hidden: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Returns memory, time and errors of both sides.

    `added_peak_ratio` and `cpu_time_ratio` are blocks over full logits; added peak is memory beyond
    the inputs and the two gradients, which both sides return. `added_peak_bytes_by_tokens` shows
    that the blocks' peak does not grow with the tokens. `max_error` and `full_logits_max_error`
    compare each side with full logits in float64, on the first tokens: the largest difference of
    log-probs and entropies, and of both gradients relative to their largest entry.
    """
    init_ranks()
    with process_group(rank=0, local_rank=0, world_size=1):
        group = dist.group.WORLD
        assert group is not None
        inputs = _inputs(vocab, hidden, tokens)
        sides: dict[str, Callable[[], Result]] = {
            "blocks": partial(_ours, *inputs, group),
            "full_logits": partial(_full, *inputs),
        }
        costs = compare(sides, rounds=rounds)
        h, w, targets = few = _inputs(vocab, hidden, min(tokens, _ERROR_TOKENS))
        wide = [x.detach().double().requires_grad_() for x in (h, w)]
        exact = _full(wide[0], wide[1], targets)
        errors = {"ours": _error(_ours(*few, group), exact), "full": _error(_full(*few), exact)}
        returned = sum(x.numel() * x.element_size() for x in inputs[:2])
        added = {name: max(cost.peak_bytes - returned, 0) for name, cost in costs.items()}
        by_tokens = {}
        for num in (tokens // 4, tokens, tokens * 4):
            few = _inputs(vocab, hidden, num)
            returned = sum(x.numel() * x.element_size() for x in few[:2])
            peak = measure(partial(_ours, *few, group)).peak_bytes
            by_tokens[num] = max(peak - returned, 0)
    return {
        "bench": "logprob",
        "shape": {"vocab": vocab, "hidden": hidden, "tokens": tokens},
        "added_peak_ratio": added["blocks"] / added["full_logits"],
        "cpu_time_ratio": costs["blocks"].work_s / costs["full_logits"].work_s,
        "max_error": errors["ours"],
        "full_logits_max_error": errors["full"],
        "added_peak_bytes": added,
        "added_peak_bytes_by_tokens": by_tokens,
        **report(costs),
    }


def _inputs(
    vocab: int, hidden: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device()).manual_seed(0)
    dtype = torch.bfloat16 if has_gpu() else torch.float32

    def normal(*shape: int, std: float) -> torch.Tensor:
        values = torch.empty(shape, device=device()).normal_(0, std, generator=generator)
        return values.to(dtype).requires_grad_()

    targets = torch.randint(0, vocab, (tokens,), generator=generator, device=device())
    # The logits have a standard deviation of about 2, as those of a trained model do.
    return normal(tokens, hidden, std=1.0), normal(vocab, hidden, std=2 * hidden**-0.5), targets


def _ours(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup
) -> Result:
    logprobs, entropy = token_logprobs(
        hidden, weight, targets, temperature=_TEMPERATURE, vocab_size=len(weight), tp_group=group
    )
    return _with_gradients(hidden, weight, logprobs, entropy)


def _full(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Result:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logp = ((hidden @ weight.t()).to(wide) / _TEMPERATURE).log_softmax(-1)
    logprobs = logp.gather(1, targets[:, None])[:, 0]
    return _with_gradients(hidden, weight, logprobs, -(logp.exp() * logp).sum(-1))


def _with_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, logprobs: torch.Tensor, entropy: torch.Tensor
) -> Result:
    total = logprobs.mean() + 0.01 * entropy.mean()
    by_hidden, by_weight = torch.autograd.grad(total, (hidden, weight))
    return logprobs.detach(), entropy.detach(), by_hidden, by_weight


def _error(ours: Result, full: Result) -> float:
    apart = [float((a.double() - b.double()).abs().max()) for a, b in zip(ours, full, strict=True)]
    scale = [1.0, 1.0, *(float(g.abs().max()) for g in full[2:])]
    return max(a / s for a, s in zip(apart, scale, strict=True))
