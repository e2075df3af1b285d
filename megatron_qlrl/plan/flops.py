"""Counts model FLOPs exactly; a multiplication and an addition are two.

The matrix products of the linear layers, of attention and of the LM head are counted. Causal
attention counts the n (n + 1) / 2 pairs that it needs, whatever else a kernel computes.
Recomputation is not counted (these are model FLOPs, as in MFU).
"""

from collections.abc import Sequence

from megatron_qlrl.config.shape import ModelShape

UPDATE_TO_FORWARD = 3
"""An update is a forward pass, and a backward pass with two products for each of its products."""


def block_flops(shape: ModelShape, prompt: int, responses: Sequence[int]) -> float:
    """Returns the forward FLOPs of a prompt, computed once, with its responses (lengths in tokens):
    linear layers on every token, attention of the prompt on itself and of each response on the
    prompt and on itself, and the LM head for response tokens only."""
    return shape.num_layers * (
        linear_flops(shape) * (prompt + sum(responses))
        + attention_flops(shape, block_pairs(prompt, responses))
    ) + head_flops(shape, sum(responses))


def separate_flops(shape: ModelShape, prompt: int, responses: Sequence[int]) -> float:
    """Returns `block_flops` if the prompt were computed again for every response, as is usual."""
    return sum(block_flops(shape, prompt, [r]) for r in responses)


def linear_flops(shape: ModelShape) -> float:
    """Returns the forward FLOPs of one layer's linear maps on one token."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return 2 * shape.hidden_size * (2 * q + 2 * kv) + mlp_flops(shape)


def mlp_flops(shape: ModelShape) -> float:
    """Returns the MLP's part of `linear_flops`: with experts, the router's and that of the experts
    that a token uses."""
    if shape.experts is None:
        return 2 * shape.hidden_size * 3 * shape.ffn_size
    used = 3 * shape.experts.per_token * shape.experts.ffn_size
    return 2 * shape.hidden_size * (used + shape.experts.num)


def attention_flops(shape: ModelShape, num_pairs: float) -> float:
    """Returns the forward FLOPs of one layer's attention over this many (query, key) pairs."""
    return 4 * shape.num_heads * shape.head_dim * num_pairs


def head_flops(shape: ModelShape, tokens: int) -> float:
    """Returns the forward FLOPs of the LM head."""
    return 2 * shape.hidden_size * shape.vocab_size * tokens


def block_pairs(prompt: int, responses: Sequence[int]) -> float:
    """Returns the (query, key) pairs of `block_flops`."""
    return pairs(prompt) + sum(pairs(r) + r * prompt for r in responses)


def pairs(tokens: int) -> float:
    """Returns the (query, key) pairs of a sequence's causal attention on itself."""
    return tokens * (tokens + 1) / 2


def prefill_flops(shape: ModelShape, tokens: int) -> float:
    """Returns the forward FLOPs of reading a prompt: the layers on every token, no LM head."""
    return shape.num_layers * (linear_flops(shape) * tokens + attention_flops(shape, pairs(tokens)))
