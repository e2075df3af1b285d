"""Counts what one micro-batch keeps on a rank between its forward and its backward pass, and the
working memory beside it, tensor by tensor from policy/model.py, attention.py and logprobs.py.

`tests/dist_cpu/test_plan_memory.py` compares the counts with the live bytes of real updates.
Symbols: T row tokens; L the row's tokens on this context parallel rank; h hidden size; M tokens
that predict a response token.
"""

from dataclasses import dataclass
from math import ceil

from megatron_qlrl.config.schema import PolicyConfig
from megatron_qlrl.config.shape import ModelShape, padded_vocab


@dataclass(frozen=True)
class Kernels:
    """The properties of the kernels in use on which the memory of a layer depends.

    Attributes:
        fused_norm: RMSNorm is part of the linear layer behind it and keeps its input; an unfused
            one keeps two float32 copies of it.
        grouped_attention: the kernel's key and value gradients have kv heads, not query heads.
        block_elements: logits that exist at one time (policy/logprobs.py).
    """

    fused_norm: bool
    grouped_attention: bool
    block_elements: int


GPU = Kernels(fused_norm=True, grouped_attention=True, block_elements=2**26)
CPU = Kernels(fused_norm=False, grouped_attention=False, block_elements=2**20)

BLOCK_TOKENS = 1024
"""Tokens of one block of logits (policy/logprobs.py)."""


@dataclass(frozen=True)
class Row:
    """The row that is planned for: its tokens, and how many of them are response tokens."""

    tokens: int
    responses: int


@dataclass(frozen=True)
class Kept:
    """The bytes that a layer keeps for its backward pass, by part."""

    norms: float
    attention: float
    mlp: float

    @property
    def total(self) -> float:
        return self.norms + self.attention + self.mlp


class Activations:
    """Counts the bytes of one rank for one row. All methods are plain arithmetic."""

    def __init__(
        self, shape: ModelShape, policy: PolicyConfig, row: Row, *, width: int, kernels: Kernels
    ) -> None:
        """`width` is the size of an element in bytes: 2 for bfloat16, 4 for float32."""
        tp = policy.tp
        self.shape, self.policy, self.row, self.kernels = shape, policy, row, kernels
        self.width = width
        self.shards = tp if policy.sequence_parallel else 1
        share = -(-row.tokens // policy.cp)
        self.tokens = -(-share // policy.tokens_multiple) * policy.tokens_multiple
        self.gathered = policy.cp > 1 or self.tokens != row.tokens
        self.hidden = shape.hidden_size / self.shards
        self.q = shape.num_heads * shape.head_dim / tp
        self.kv = shape.num_kv_heads * shape.head_dim / tp
        self.ffn = shape.ffn_size / tp
        # Each rank gets as many tokens as it sends to experts, if they are used evenly.
        per_token = shape.experts.per_token if shape.experts else 0
        self.routed = self.tokens / self.shards * per_token
        self.vocab = padded_vocab(shape.vocab_size, tp) // tp

    def layer(self) -> Kept:
        """Returns what one layer keeps without recomputation."""
        return Kept(self._norms(), self._attention(), self._mlp())

    def selective_layer(self) -> Kept:
        """Returns what a layer keeps when its MLP is recomputed, with the norm if it is fused (the
        norm in front of experts never is)."""
        fused = self.kernels.fused_norm and not self.shape.experts
        inside = self.stream() if fused else 0.0
        return Kept(self._norms() - inside, self._attention(), 0.0)

    def stage(self, stage: int) -> float:
        """Returns what a pipeline stage keeps: its layers, its input, and its output (on the last
        stage the final norm and the head's inputs)."""
        kept = self._layers() * self._kept_layer()
        if self.policy.recompute == "full":
            kept += 4 * self.shape.head_dim * self.tokens  # angles
        if self.policy.offload_activations and stage:
            kept += self.stream()  # the received input waits for its gradient
        if stage < self.policy.pp - 1:
            return kept + self.stream()
        return kept + self._norm_input(self.hidden) + self.head_inputs()

    def stream(self) -> float:
        """Returns the size of one tensor of hidden states, [L, h]."""
        return self.tokens * self.hidden * self.width

    def on_host(self) -> float:
        """Returns the size of a stage's layer inputs in pinned host memory. Each takes whole
        MiB (policy/offload.py)."""
        if not self.policy.offload_activations:
            return 0.0
        return self._layers() * ceil(self.stream() / 2**20) * 2.0**20

    def head_inputs(self) -> float:
        """Returns the size of the hidden states that predict response tokens, [M, h]."""
        return self._predicted() * self.shape.hidden_size * self.width

    def working(self, stage: int) -> dict[str, float]:
        """Returns the bytes beside what a stage keeps, at each moment of a backward pass that can
        be the peak. What has been freed by then is subtracted."""
        moments = {
            "MLP gradients": self._mlp_backward(),
            "attention gradients": self._attn_backward(),
        }
        if stage == self.policy.pp - 1:
            # The final norm and the head's inputs are freed by then.
            freed = self._norm_input(self.hidden) + self.head_inputs()
            moments = {name: size - freed for name, size in moments.items()}
            moments["log-probs forward"] = self._block_forward()
            moments["log-probs backward"] = self._block_backward()
        return moments

    def gather_buffer(self) -> float:
        """Returns the size of the buffer, never freed, in which Megatron gathers the inputs that
        sequence parallelism has split."""
        if self.shards == 1:
            return 0.0
        return self.tokens * self.shape.hidden_size * self.width

    # --- kept -----------------------------------------------------------------------------

    def _norms(self) -> float:
        """The inputs of two norms, and their outputs, which the linear layers behind them keep."""
        return 2 * (self._norm_input(self.hidden) + self.stream())

    def _norm_input(self, features: float) -> float:
        each = self.width if self.kernels.fused_norm else 8
        return self.tokens * (features * each + 4 * features / self.shape.hidden_size)

    def _attention(self) -> float:
        w, tokens = self.width, self.tokens
        kept = 4 * self.shape.head_dim * tokens * w  # cos and sin, for queries and for keys
        kept += 2 * self.q * tokens * w  # rotated queries; output, which linear_proj shares
        local = (self.q + 3 * self.kv) * tokens * w  # values are a view of linear_qkv's output
        kept += self._lse() + (self._row_keys() if self.gathered else local)
        if self.shape.qk_norm and not self.kernels.fused_norm:
            kept += 8 * (self.q + self.kv) * tokens
        elif self.shape.qk_norm:
            kept += (self.q + self.kv) * tokens * w
        return kept

    def _mlp(self) -> float:
        if self.shape.experts is None:
            return 5 * self.ffn * self.tokens * self.width
        return self._expert_inputs() + self._in_experts() + self._router()

    def _expert_inputs(self) -> float:
        """The hidden states of tokens, once for each expert that they go to."""
        return self.routed * self.shape.hidden_size * self.width

    def _in_experts(self) -> float:
        assert self.shape.experts is not None
        return 6 * self.shape.experts.ffn_size * self.routed * self.width

    def _router(self) -> float:
        """Weights of all experts in two orders, choices as flags in two orders, the chosen ones'
        weights and numbers three times, and the input in float32 if it is of another type."""
        assert self.shape.experts is not None
        tokens = self.tokens / self.shards
        kept = tokens * self.shape.experts.num * 2 * (4 + 1) + self.routed * 3 * (8 + 4)
        return kept + (4 * self.hidden * self.tokens if self.width < 4 else 0.0)

    def _row_keys(self) -> float:
        """Keys and values of the whole row, in row order."""
        return 2 * self.kv * self.row.tokens * self.width

    def _lse(self) -> float:
        return 4 * self.tokens * self.q / self.shape.head_dim

    def _predicted(self) -> int:
        return -(-self.row.responses // self.policy.cp)

    # --- working --------------------------------------------------------------------------

    def _layers(self) -> int:
        return self.shape.num_layers // self.policy.pp

    def _kept_layer(self) -> float:
        """What a layer keeps on the device between its forward and its backward pass."""
        if self.policy.recompute == "full":
            return 0.0 if self.policy.offload_activations else self.stream()
        if self.policy.recompute == "selective":
            return self.selective_layer().total
        return self.layer().total

    def _recomputed_layer(self) -> float:
        """With "full", what the recomputed layer keeps, and its output. Its input is counted only
        if the norm keeps a copy in another type or if it comes from host memory."""
        if self.policy.recompute != "full":
            return 0.0
        copied = not self.kernels.fused_norm and self.width < 4
        return self.layer().total + self.stream() * (copied + self.policy.offload_activations)

    def _mlp_backward(self) -> float:
        """Gradients of the MLP's output, of the product in it and of one of the factors. With
        experts the forward pass before it, computed again or not, holds more: tokens as sent and as
        received, the experts' outputs one by one and joined."""
        if self.shape.experts:
            copies = 4 if self.policy.ep > 1 else 3  # a rank alone receives what it sends
            gradients = self.stream() + copies * self._expert_inputs()
        else:
            gradients = self.stream() + 2 * self.ffn * self.tokens * self.width
        if self.policy.recompute == "selective":  # the MLP computed again, and its output
            return gradients + self.layer().total - self.selective_layer().total + self.stream()
        return gradients + self._recomputed_layer()

    def _attn_backward(self) -> float:
        """Gradients of output, queries, keys and values, and those of one piece of attention. What
        the MLP kept is freed by then."""
        kept = self.selective_layer() if self.policy.recompute == "selective" else self.layer()
        w, keys = self.width, self._row_keys()
        piece = keys if self.kernels.grouped_attention else keys * self.q / self.kv
        gradients = 2 * self.stream() + 3 * self.q * self.tokens * w + keys + piece
        if self.gathered:
            gradients += keys  # a copy in the ranks' order
        mlp_norm = kept.norms - self._norms() / 2
        return gradients + self._recomputed_layer() - kept.mlp - mlp_norm

    def _block_forward(self) -> float:
        if self.width == 4:
            return 8 * self.kernels.block_elements
        return 8 * self.kernels.block_elements + (4 + self.width) * self._block()

    def _block_backward(self) -> float:
        """Float32 gradients of the head's inputs and weight, and beside them either a block of
        logits or the two gradients cast to their own type."""
        elements = (self._predicted() + self.vocab) * self.shape.hidden_size
        gradients = 4 * elements
        block = 8 * self.kernels.block_elements
        if self.width == 4:
            return gradients + block
        columns = self._block() / self._block_tokens()
        product = columns * self.shape.hidden_size * self.width
        block += self._block() * (4 + self.width) + product
        return gradients + max(block, self.width * elements)

    def _block(self) -> float:
        """Logits of the largest block."""
        tokens = self._block_tokens()
        return tokens * min(self.kernels.block_elements // tokens, self.vocab)

    def _block_tokens(self) -> int:
        return max(1, min(self._predicted(), BLOCK_TOKENS))
