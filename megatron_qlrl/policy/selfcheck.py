"""First use checks itself: on a slice of the batch, every layer's attention must equal attention
written out in float64, forward and backward, with this machine's kernels and this job's layout.

Each layer is judged alone, by the queries, keys and values that the job's weights make of the
slice: no rounding of earlier layers or of the head counts. (From end to end, sound bfloat16 models
differ too much between shared prompts and separate rows: the gradients of random ones with a peaked
head by 0.2 with 28 layers, by 0.6 with 48.) How much rounding a layer may show is measured beside
it: plain torch operations in the model's type against the same float64.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_qlrl.errors import KernelError
from megatron_qlrl.parallel.collectives import gather_objects
from megatron_qlrl.parallel.context import Axis
from megatron_qlrl.platform.device import has_gpu
from megatron_qlrl.platform.machine import attention_kernel
from megatron_qlrl.policy.attention import AttentionPlan, SegmentAttention
from megatron_qlrl.policy.policy import Policy
from megatron_qlrl.types import PackedRow

ALLOWED_NOISE = 6.0
"""An error up to this many times the rounding noise passes. torch's CPU kernel shows up to 2 times
(a shared prompt's gradients are sums of rounded parts), a log-sum-exp that is off by 0.5 in
bfloat16 13 times. No GPU's kernel has been measured yet."""

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Finding:
    """The error of one part of a layer's attention on one rank, relative to the norm of the right
    result."""

    layer: int
    what: str
    error: float
    noise: float

    def ratio(self, dtype: torch.dtype) -> float:
        """Returns the error in units of the noise, which is at least one rounding."""
        return self.error / max(self.noise, torch.finfo(dtype).eps / 8)


@dataclass(frozen=True)
class _Measured:
    """A layer's attention on one row: its queries, keys and values in row order ([T, heads, d]),
    and for each of _PARTS the squared norms of error, noise and what is right ([4, 3])."""

    inputs: Tensors
    squares: np.ndarray


_PARTS = ("output", "gradient (queries)", "gradient (keys)", "gradient (values)")
"""The output is that of the response tokens: a prompt sees itself alone, shared or not."""


def check_sharing(
    policy: Policy, shared: Sequence[PackedRow], separate: Sequence[PackedRow]
) -> float:
    """Checks shared against separate rows, which hold the same responses to the same prompts, and
    returns the largest error in units of the noise. Collective; the policy does not change.

    Raises:
        KernelError: names the first layer whose output is wrong, or else the first one whose
            gradient is (every rank).
    """
    with without_fp8(policy.model.config):
        alone = _measured_layers(policy, separate)
        together = _measured_layers(policy, shared)
    # Rotary embeddings are the same for all layers; behind the first, inputs carry rounding.
    _judge(policy, _input_findings(shared, together, separate, alone), "shared prompts")
    return max(
        _judge(policy, _findings(alone), "separate rows"),
        _judge(policy, _findings(together), "shared prompts"),
    )


def _judge(policy: Policy, mine: Sequence[Finding], side: str) -> float:
    """Returns the largest ratio of any rank."""
    dtype = policy.model.config.params_dtype
    findings = [finding for part in gather_objects(list(mine)) for finding in part]
    # A comparison with NaN is false: what counts is that an error is NOT small.
    wrong = [f for f in findings if not f.ratio(dtype) <= ALLOWED_NOISE]
    if not wrong:
        return max(f.ratio(dtype) for f in findings)
    first = min(wrong, key=lambda f: (f.what != "output", f.layer))
    kernel = attention_kernel(gpu=has_gpu())
    way_out = (
        "Set policy.share_prompts=false to train without sharing, and compare"
        if side == "shared prompts"
        else "Rows without a shared prompt are wrong too: compare"
    )
    raise KernelError(
        f"self-check: with the attention kernel {kernel.name}, the {first.what} of layer "
        f"{first.layer} with {side} is off by {first.error:.1e}, {first.ratio(dtype):.0f} times "
        f"its rounding noise (allowed: {ALLOWED_NOISE:.0f} times). {way_out} the versions that "
        "`qlrl check` prints with those in docs/gpus.md"
    )


@contextmanager
def without_fp8(config: Any) -> Iterator[None]:
    """A block in which the model of `config` computes nothing in FP8. Attention never does, but its
    inputs are, by blocks of tokens that sharing moves."""
    fp8, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = fp8


def _findings(layers: dict[int, list[_Measured]]) -> list[Finding]:
    findings = []
    for layer, rows in layers.items():
        error, noise, right = np.sqrt(sum(m.squares for m in rows)).T
        scale = np.maximum(right, np.finfo(np.float64).tiny)
        error, noise = error / scale, noise / scale
        noise[1:] = noise[1:].max()  # all three stand on the same shares
        parts = zip(_PARTS, error, noise, strict=True)
        findings += [Finding(layer, what, float(e), float(n)) for what, e, n in parts]
    return findings


def _input_findings(
    shared: Sequence[PackedRow],
    together: dict[int, list[_Measured]],
    separate: Sequence[PackedRow],
    alone: dict[int, list[_Measured]],
) -> list[Finding]:
    """What sharing changes in the first layer's queries, keys and values (on the ranks that have
    it): nothing but rounding, if every response token keeps its position."""
    if 1 not in alone:
        return []
    pairs = zip(_responses(shared, together[1]), _responses(separate, alone[1]), strict=True)
    errors = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs]
    eps = max(torch.finfo(x.dtype).eps for x in together[1][0].inputs)
    return [Finding(1, "input", error, eps) for error in errors]


def _responses(rows: Sequence[PackedRow], measured: Sequence[_Measured]) -> list[torch.Tensor]:
    """Queries, keys and values of all response tokens, in the order of (group, sample)."""
    parts = {
        (block.group, sample): [x[start:end].double() for x in m.inputs]
        for row, m in zip(rows, measured, strict=True)
        for block in row.blocks
        for sample, (start, end) in zip(block.samples, block.responses, strict=True)
    }
    return [torch.cat(tensors) for tensors in zip(*(parts[k] for k in sorted(parts)), strict=True)]


def _measured_layers(policy: Policy, rows: Sequence[PackedRow]) -> dict[int, list[_Measured]]:
    """Measures each of this rank's layers on each row."""
    by_layer: dict[int, list[_Measured]] = {}

    def record(layer: int, attention: Any, args: Any, kwargs: Any, _: Any) -> None:
        done = by_layer.setdefault(layer, [])
        plan = kwargs["packed_seq_params"]
        done.append(_measure(policy, rows[len(done)], attention, args[:3], plan))

    layers: Any = policy.model.decoder.layers
    hooks = [
        layer.self_attention.core_attention.register_forward_hook(
            partial(record, layer.layer_number), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        policy.add_logprobs(rows, "self_check")
    finally:
        for hook in hooks:
            hook.remove()
    return by_layer


def _measure(
    policy: Policy,
    row: PackedRow,
    attention: SegmentAttention,
    qkv: Tensors,
    plan: AttentionPlan,
) -> _Measured:
    """Measures one layer on one row; `qkv` are this rank's tokens of it, [L, 1, heads, d]."""
    places = _places(policy, row).to(qkv[0].device)
    whole = partial(_whole_row, policy.context.cp, places)
    inputs = query, key, value = tuple(whole(x[:, 0]) for x in qkv)
    generator = torch.Generator().manual_seed(row.num_tokens)
    cotangent = torch.randn(query.shape, generator=generator).to(query)
    block, part = (torch.from_numpy(x).to(cotangent.device) for x in _members(row))
    mask = visible(block, part)

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention.forward(q, k, v, packed_seq_params=plan).view_as(q)

    local = _local_part(policy.context.cp, places, cotangent, len(qkv[0]))[:, None]
    ours = [whole(x[:, 0]) for x in _with_gradients(kernel, qkv, local)]
    plain = partial(plain_attention, mask=mask, scale=attention.scale)
    noisy = plain(query, key, value, cotangent)
    right = plain(query.double(), key.double(), value.double(), cotangent.double())
    for tensors in (ours, noisy, right):
        tensors[0] = tensors[0][part > 0]
    triples = zip(ours, noisy, right, strict=True)
    squares = [[_square(o - r), _square(n - r), _square(r)] for o, n, r in triples]
    return _Measured(inputs, np.array(squares))


def _square(x: torch.Tensor) -> float:
    return float(x.square().sum())


def _with_gradients(
    attention: Callable[..., torch.Tensor], qkv: Tensors, cotangent: torch.Tensor
) -> list[torch.Tensor]:
    """Returns the output, and the gradients of queries, keys and values."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    with torch.enable_grad():
        out = attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_out: torch.Tensor,
    *,
    mask: torch.Tensor,
    scale: float,
) -> list[torch.Tensor]:
    """Computes attention by its definition, [T, heads, d] on [T, kv_heads, d] where `mask` [T, T]
    allows it, and returns the output with the gradients of query, key and value.

    It rounds where flash attention does: factors of a product have the inputs' type, and the
    backward pass starts from the rounded output and the log-sum-exp (arXiv 2205.14135).
    """
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    num_kv, group = key.shape[1], query.shape[1] // key.shape[1]

    def product(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum(equation, a.to(dtype).to(wide), b.to(dtype).to(wide))

    keys, values = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = product("qhd,khd->hqk", query, keys).mul(scale).masked_fill(~mask, -torch.inf)
    shares = (scores - scores.logsumexp(-1, keepdim=True)).exp()
    out = product("hqk,khd->qhd", shares, values).to(dtype)
    grad_shares = product("qhd,khd->hqk", grad_out, values)
    mean = torch.einsum("qhd,qhd->hq", grad_out.to(wide), out.to(wide))
    grad_scores = shares * (grad_shares - mean[..., None])
    dq = product("hqk,khd->qhd", grad_scores, keys) * scale
    dk = product("hqk,qhd->khd", grad_scores, query) * scale
    dv = product("hqk,qhd->khd", shares, grad_out)
    dk, dv = (x.unflatten(1, (num_kv, group)).sum(2) for x in (dk, dv))
    return [out, *(x.to(dtype) for x in (dq, dk, dv))]


def _members(row: PackedRow) -> tuple[np.ndarray, np.ndarray]:
    """The block of each token, and its part there: 0 is the prompt, then the responses; [T]."""
    block, part = np.empty((2, row.num_tokens), np.int64)
    for number, b in enumerate(row.blocks):
        for kind, (start, end) in enumerate([b.prompt, *b.responses]):
            block[start:end], part[start:end] = number, kind
    return block, part


def visible(block: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Returns bool [T, T]: a token (first axis) sees its prompt and its own past."""
    own = (part == part[:, None]) | (part == 0)
    return ((block == block[:, None]) & own).tril()


def _places(policy: Policy, row: PackedRow) -> torch.Tensor:
    """Where each token of the row lies in what is gathered over context parallel ranks, [T]."""
    index = policy.shard(row).kv_index
    return torch.arange(row.num_tokens) if index is None else torch.from_numpy(index)


def _whole_row(cp: Axis, places: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """[T, ...] in row order, from the tokens that this rank holds."""
    whole = local.new_empty(cp.size * len(local), *local.shape[1:])
    dist.all_gather_into_tensor(whole, local.contiguous(), group=cp.group)
    return whole[places]


def _local_part(cp: Axis, places: torch.Tensor, whole: torch.Tensor, length: int) -> torch.Tensor:
    """Returns this rank's `length` tokens of [T, ...], with zeros where it pads (undoes
    `_whole_row`)."""
    padded = whole.new_zeros(cp.size * length, *whole.shape[1:])
    padded[places] = whole
    return padded[cp.rank * length :][:length]
