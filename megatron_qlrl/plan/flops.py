"""Model FLOPs, counted exactly: a multiplication and an addition of a matrix product are two.

Counted are the matrix products of the linear layers and of attention and the LM head; causal
attention counts the pairs it needs, n (n + 1) / 2, whatever a kernel computes beside them.
Recomputation is not counted (model FLOPs, as in MFU).
"""

from collections.abc import Sequence

from megatron_qlrl.config.shape import ModelShape

UPDATE_TO_FORWARD = 3
"""An update is a forward pass and two products of the same size for each of its products."""


def block_flops(shape: ModelShape, prompt: int, responses: Sequence[int]) -> float:
    """Forward FLOPs of one prompt computed once with its responses (lengths in tokens): linear
    layers on every token, attention of the prompt on itself and of each response on the prompt
    and on itself, LM head for response tokens only."""
    return shape.num_layers * (
        linear_flops(shape) * (prompt + sum(responses))
        + attention_flops(shape, pairs(prompt) + sum(pairs(r) + r * prompt for r in responses))
    ) + head_flops(shape, sum(responses))


def separate_flops(shape: ModelShape, prompt: int, responses: Sequence[int]) -> float:
    """The same with the prompt computed again for every response: the usual layout."""
    return sum(block_flops(shape, prompt, [r]) for r in responses)


def linear_flops(shape: ModelShape) -> float:
    """Forward FLOPs of one layer's linear maps on one token."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return 2 * shape.hidden_size * (2 * q + 2 * kv + 3 * shape.ffn_size)


def mlp_flops(shape: ModelShape) -> float:
    """The MLP's part of `linear_flops`."""
    return 2 * shape.hidden_size * 3 * shape.ffn_size


def attention_flops(shape: ModelShape, num_pairs: float) -> float:
    """Forward FLOPs of one layer's attention over (query, key) pairs: scores and values."""
    return 4 * shape.num_heads * shape.head_dim * num_pairs


def head_flops(shape: ModelShape, tokens: int) -> float:
    """Forward FLOPs of the LM head."""
    return 2 * shape.hidden_size * shape.vocab_size * tokens


def pairs(tokens: int) -> float:
    """(query, key) pairs of causal attention of a sequence on itself."""
    return tokens * (tokens + 1) / 2


def prefill_flops(shape: ModelShape, tokens: int) -> float:
    """Forward FLOPs of reading a prompt: layers on every token, no LM head."""
    return shape.num_layers * (linear_flops(shape) * tokens + attention_flops(shape, pairs(tokens)))
