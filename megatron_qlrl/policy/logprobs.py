"""Log-probability and exact entropy of given tokens, without a [tokens, vocabulary] tensor.

Works on the hidden states of predicting positions and this rank's vocabulary shard, a chunk of
tokens at a time; the backward pass computes each chunk's logits again. Peak extra memory is
[chunk_tokens, vocabulary / tp] in float32, whatever the number of tokens.

With z = h W^T / temperature, p = softmax(z), H = -sum p log p:
    d log p(t) / dz = onehot(t) - p        dH / dz = -p (log p + H)
"""

from typing import Any

import torch
import torch.distributed as dist


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
    chunk_tokens: int,
    tp_group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of `targets` at sampling temperature, float32 (or wider) [M].

    Args:
        hidden: [M, hidden]. Its gradient is this vocabulary shard's share: the caller's
            tensor-parallel region (or reduce-scatter) adds the shards up.
        weight: this rank's shard of the output weight, [padded_vocab / tp, hidden].
        targets: int64 [M], global token ids.
        vocab_size: number of real tokens; padded rows of the weight never get probability.
    """
    first = dist.get_rank(tp_group) * weight.shape[0]
    real = max(0, min(weight.shape[0], vocab_size - first))
    return _TokenLogprobs.apply(
        hidden, weight, targets, temperature, first, real, chunk_tokens, tp_group
    )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        first: int,
        real: int,
        chunk_tokens: int,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        num = hidden.shape[0]
        stats = torch.zeros(3, num, dtype=wide, device=hidden.device)
        for start in range(0, num, chunk_tokens):
            part = slice(start, min(start + chunk_tokens, num))
            stats[:, part] = _chunk_statistics(
                _logits(hidden[part], weight[:real], temperature), targets[part] - first, group
            )
        target_logit, lse, mean_logit = stats
        logprobs, entropy = target_logit - lse, lse - mean_logit
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature, ctx.first, ctx.real, ctx.chunk_tokens = (
            temperature, first, real, chunk_tokens,
        )  # fmt: skip
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        grad_logprob, grad_entropy = grads
        grad_hidden = torch.zeros_like(hidden)
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            part = slice(start, min(start + ctx.chunk_tokens, hidden.shape[0]))
            z = _logits(hidden[part], weight[: ctx.real], ctx.temperature)
            logp = z - lse[part, None]
            p = logp.exp()
            g_logp, g_ent = grad_logprob[part, None], grad_entropy[part, None]
            grad_z = -p * (g_logp + g_ent * (logp + entropy[part, None]))
            local = targets[part] - ctx.first
            mine = ((local >= 0) & (local < ctx.real)).nonzero().squeeze(1)
            grad_z[mine, local[mine]] += g_logp[mine, 0]
            grad_z = (grad_z / ctx.temperature).to(hidden.dtype)
            grad_hidden[part] = grad_z @ weight[: ctx.real]
            grad_weight[: ctx.real] += grad_z.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden @ weight.t()).to(wide) / temperature


def _chunk_statistics(
    z: torch.Tensor, local_targets: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """[3, chunk]: the target's logit, the log-sum-exp and sum p z over the WHOLE vocabulary."""
    num, real = z.shape
    peak = z.amax(1) if real else z.new_full((num,), -torch.inf)
    _reduce(peak, group, dist.ReduceOp.MAX)
    shifted = (z - peak[:, None]).exp()
    inside = (local_targets >= 0) & (local_targets < real)
    picked = z.new_zeros(num)
    rows = inside.nonzero().squeeze(1)
    picked[rows] = z[rows, local_targets[rows]]
    sums = torch.stack([picked, shifted.sum(1), (shifted * z).sum(1)])
    _reduce(sums, group, dist.ReduceOp.SUM)
    return torch.stack([sums[0], sums[1].log() + peak, sums[2] / sums[1]])


def _reduce(values: torch.Tensor, group: dist.ProcessGroup, how: Any) -> None:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=how, group=group)
