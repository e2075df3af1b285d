"""Computes log-probs and exact entropies of tokens without a [tokens, vocabulary] tensor.

It works on the hidden states of predicting positions and this rank's vocabulary shard, one block of
tokens x vocabulary at a time; the backward pass computes each block's logits again. For any
number of tokens it needs memory for the two gradients and one block. On a CPU a block stays in the
cache, whereas full logits would move through memory a dozen times.

With z = h W^T / temperature, p = softmax(z), H = -sum p log p:
    d log p(t) / dz = onehot(t) - p        dH / dz = -p (log p + H)
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

CPU_BLOCK_ELEMENTS = 2**20
"""The number of logits that exist at one time: 4 MiB of float32, which stay in the cache."""
GPU_BLOCK_ELEMENTS = 2**26
"""The same on a GPU: 256 MiB of float32. It has not been tuned on a GPU yet."""
_BLOCK_TOKENS = 1024


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    block: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns log-probs and entropies of `targets` at `temperature`, float32 or wider [M].

    Args:
        hidden: [M, hidden]. Its gradient is this vocabulary shard's share: the caller's
            tensor-parallel region (or reduce-scatter) adds the shards up.
        weight: this rank's shard of the output weight, [padded_vocab / tp, hidden].
        targets: int64 [M], global token ids below vocab_size (`policy.check_token_ids`).
        vocab_size: number of real tokens; padded rows of the weight never get probability.
        block: tokens and vocabulary entries whose logits exist at one time.
    """
    first = dist.get_rank(tp_group) * weight.shape[0]
    real = max(0, min(weight.shape[0], vocab_size - first))
    block = block or _default_block(hidden)
    return _TokenLogprobs.apply(hidden, weight, targets - first, temperature, real, block, tp_group)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        local: torch.Tensor,
        temperature: float,
        real: int,
        block: tuple[int, int],
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`local` holds the targets, counted from this shard's first entry."""
        statistics = _shard_statistics(hidden, weight[:real], local, temperature, block)
        target_logit, lse, entropy = _merge_shards(*statistics, group)
        ctx.save_for_backward(hidden, weight, local, lse, entropy)
        ctx.temperature, ctx.real, ctx.block = temperature, real, block
        ctx.set_materialize_grads(False)
        return target_logit - lse, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        hidden, weight, local, lse, entropy = ctx.saved_tensors
        by_logprob = torch.zeros_like(lse) if grads[0] is None else grads[0] / ctx.temperature
        by_entropy = None if grads[1] is None else grads[1] / ctx.temperature
        wide = lse.dtype
        # float32 whatever the model's type: many blocks add up.
        grad_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        buffers = _buffers(lse, ctx.block)
        for rows, columns in _blocks(len(hidden), ctx.real, ctx.block):
            h, w = hidden[rows], weight[columns]
            grad_z = _logits(h, w, ctx.temperature, minus=lse[rows], out=buffers[0])
            # p (by_logprob + by_entropy (log p + H)) - onehot by_logprob, in place of log p
            if by_entropy is None:
                grad_z.exp_().mul_(by_logprob[rows, None])
            else:
                slope = by_entropy[rows, None]
                offset = by_logprob[rows, None] + slope * entropy[rows, None]
                share = torch.addcmul(offset, slope, grad_z, out=_view(buffers[1], grad_z))
                grad_z.exp_().mul_(share)
            inside, index = _inside(local[rows], columns)
            grad_z.scatter_add_(1, index, torch.where(inside, -by_logprob[rows], 0)[:, None])
            grad_z = grad_z.to(h.dtype)
            _subtract_product(grad_hidden[rows], grad_z, w)
            _subtract_product(grad_weight[columns], grad_z.t(), h)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), *[None] * 5


def _default_block(hidden: torch.Tensor) -> tuple[int, int]:
    tokens = max(1, min(len(hidden), _BLOCK_TOKENS))
    return tokens, (GPU_BLOCK_ELEMENTS if hidden.is_cuda else CPU_BLOCK_ELEMENTS) // tokens


def _blocks(num_tokens: int, vocab: int, block: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    for row in range(0, num_tokens, block[0]):
        for column in range(0, vocab, block[1]):
            yield (
                slice(row, min(row + block[0], num_tokens)),
                slice(column, min(column + block[1], vocab)),
            )


def _buffers(like: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns room for two blocks, which all blocks reuse: fresh memory costs page faults."""
    return like.new_empty(block[0] * block[1]), like.new_empty(block[0] * block[1])


def _view(buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return buffer[: like.numel()].view(like.shape)


def _logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    temperature: float,
    *,
    minus: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """hidden W^T / temperature - minus[:, None], float32 or wider; `out` may be used for it."""
    wide = minus.dtype
    if hidden.dtype is wide:
        room = out[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        return torch.addmm(-minus[:, None], hidden, weight.t(), alpha=1 / temperature, out=room)
    if hidden.is_cuda:
        # Rounding logits to bfloat16 would cost 0.06 at a logit of 20.
        logits = torch.mm(hidden, weight.t(), out_dtype=wide)
    else:
        logits = (hidden @ weight.t()).to(wide)
    return logits.div_(temperature).sub_(minus[:, None])


def _subtract_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total -= a b, in place."""
    if total.dtype is a.dtype:
        total.addmm_(a, b, alpha=-1)
    else:
        total -= a @ b


def _inside(local: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which targets lie in `columns`, and their column there ([n, 1], others any)."""
    inside = (local >= columns.start) & (local < columns.stop)
    index = (local - columns.start).clamp(0, columns.stop - columns.start - 1)
    return inside, index[:, None]


def _shard_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    local: torch.Tensor,
    temperature: float,
    block: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (peak [M], sums float64 [3, M]) of this shard, in one pass over its blocks.

    sums: the target's logit (0 when it lies elsewhere), sum e^{z - peak} and
    sum e^{z - peak} (z - peak). Hundreds of blocks are added up: float32 would lose 1e-5.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    num = len(hidden)
    peak = torch.full((num,), -torch.inf, dtype=wide, device=hidden.device)
    sums = torch.zeros(3, num, dtype=torch.float64, device=hidden.device)
    zero, buffers = torch.zeros_like(peak), _buffers(peak, block)
    for rows, columns in _blocks(num, len(weight), block):
        z = _logits(hidden[rows], weight[columns], temperature, minus=zero[rows], out=buffers[0])
        inside, index = _inside(local[rows], columns)
        sums[0, rows] += torch.where(inside, z.gather(1, index)[:, 0], 0)
        higher = torch.maximum(peak[rows], z.amax(1))
        _move_peak(sums[1:, rows], peak[rows], higher)
        peak[rows] = higher
        z -= higher[:, None]
        e = torch.exp(z, out=_view(buffers[1], z))
        sums[1, rows] += e.sum(1)
        sums[2, rows] += e.mul_(z).sum(1)
    return peak, sums


def _move_peak(sums: torch.Tensor, peak: torch.Tensor, higher: torch.Tensor) -> None:
    """Restates the last two sums ([2, n]) for a higher peak, in place."""
    down = torch.where(peak.isneginf(), 0, peak - higher)
    sums[1] += sums[0] * down
    sums *= down.exp()


def _merge_shards(
    peak: torch.Tensor, sums: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns target logit, log-sum-exp and entropy over the WHOLE vocabulary, each [M]."""
    if dist.get_world_size(group) > 1:
        higher = peak.clone()
        dist.all_reduce(higher, op=dist.ReduceOp.MAX, group=group)
        _move_peak(sums[1:], peak, higher)
        dist.all_reduce(sums, group=group)
        peak = higher
    target_logit, total, weighted = sums
    results = target_logit, total.log() + peak, total.log() - weighted / total
    target_logit, lse, entropy = (x.to(peak.dtype) for x in results)
    return target_logit, lse, entropy
