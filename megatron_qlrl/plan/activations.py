"""What one micro-batch keeps on a rank between its forward and its backward pass, and the working
memory beside it: counted tensor by tensor from policy/model.py, attention.py and logprobs.py.

`tests/dist_cpu/test_plan_memory.py` holds the counts against the live bytes of real updates.
Symbols: T row tokens, L of them on this context parallel rank, h hidden, q and kv the widths of
queries and of keys, f that of the MLP, w bytes of an element.
"""

from dataclasses import dataclass
from math import ceil, log2

from megatron_qlrl.config.schema import PolicyConfig
from megatron_qlrl.config.shape import ModelShape, padded_vocab


@dataclass(frozen=True)
class Kernels:
    """Where the memory of one layer depends on the kernels in use.

    Attributes:
        fused_norm: RMSNorm keeps its input; unfused it keeps two float32 copies of it. Fused ones
            are parts of the linear layers behind them.
        grouped_attention: the kernel's key and value gradients have kv heads; else query heads.
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
    """The row that is planned for: T tokens, of which `responses` meet the LM head."""

    tokens: int
    responses: int


@dataclass(frozen=True)
class Kept:
    """Bytes a layer keeps for its backward pass, by part."""

    norms: float
    attention: float
    mlp: float

    @property
    def total(self) -> float:
        return self.norms + self.attention + self.mlp


class Activations:
    """Bytes of one rank for one row. All methods are plain arithmetic."""

    def __init__(
        self, shape: ModelShape, policy: PolicyConfig, row: Row, *, width: int, kernels: Kernels
    ) -> None:
        """`width`: bytes of an activation, 2 for bfloat16 and 4 for float32."""
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
        self.vocab = padded_vocab(shape.vocab_size, tp) // tp

    def layer(self) -> Kept:
        """What one layer keeps without recomputation."""
        return Kept(self._norms(), self._attention(), 5 * self.ffn * self.tokens * self.width)

    def selective_layer(self) -> Kept:
        """What is left when the MLP is recomputed, and with it the norm that is part of it."""
        inside = self.stream() if self.kernels.fused_norm else 0.0
        return Kept(self._norms() - inside, self._attention(), 0.0)

    def stage(self, stage: int) -> float:
        """What all layers of a pipeline stage keep, with the embedding's or the received input,
        the final norm, and the output that waits for its gradient."""
        found = self._layers() * self._kept_layer()
        if self.policy.recompute == "full":
            found += 4 * self.shape.head_dim * self.tokens  # angles
        if self.policy.offload_activations and stage:
            found += self.stream()  # what was received waits for its gradient
        if stage < self.policy.pp - 1:
            return found + self.stream()
        return found + self._norm_input(self.hidden) + self.head_inputs()

    def stream(self) -> float:
        """One tensor of hidden states, [L, h]."""
        return self.tokens * self.hidden * self.width

    def on_host(self) -> float:
        """Layer inputs of a stage in pinned host memory, where torch hands out powers of two."""
        if not self.policy.offload_activations:
            return 0.0
        return self._layers() * 2.0 ** ceil(log2(self.stream()))

    def head_inputs(self) -> float:
        """Hidden states that predict response tokens, [M, h]."""
        return self._predicted() * self.shape.hidden_size * self.width

    def working(self, stage: int) -> dict[str, float]:
        """Bytes beside `stage` at the moments of a backward pass that can be the peak. A moment
        after something was freed counts what was freed as negative."""
        found = {
            "MLP gradients": self._mlp_backward(),
            "attention gradients": self._attn_backward(),
        }
        if stage == self.policy.pp - 1:
            # The final norm and the head's inputs are gone by then.
            freed = self._norm_input(self.hidden) + self.head_inputs()
            found = {name: bytes_ - freed for name, bytes_ in found.items()}
            found["log-probs forward"] = self._block_forward()
            found["log-probs backward"] = self._block_backward()
        return found

    def gather_buffer(self) -> float:
        """Megatron's buffer for the inputs that sequence parallelism gathers; never given back."""
        if self.shards == 1:
            return 0.0
        return self.tokens * self.shape.hidden_size * self.width

    # --- kept -----------------------------------------------------------------------------

    def _norms(self) -> float:
        """Two norms; the linear layers behind them keep their outputs."""
        return 2 * (self._norm_input(self.hidden) + self.stream())

    def _norm_input(self, features: float) -> float:
        each = self.width if self.kernels.fused_norm else 8
        return self.tokens * (features * each + 4 * features / self.shape.hidden_size)

    def _attention(self) -> float:
        w, tokens = self.width, self.tokens
        found = 4 * self.shape.head_dim * tokens * w  # cos and sin, for queries and for keys
        found += 2 * self.q * tokens * w  # rotated queries; output, which linear_proj shares
        local = (self.q + 3 * self.kv) * tokens * w  # values are a view of all that linear_qkv made
        found += self._lse() + (self._row_keys() if self.gathered else local)
        if self.shape.qk_norm and not self.kernels.fused_norm:
            found += 8 * (self.q + self.kv) * tokens
        elif self.shape.qk_norm:
            found += (self.q + self.kv) * tokens * w
        return found

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
        """On the device, from a layer's forward to its backward pass."""
        if self.policy.recompute == "full":
            return 0.0 if self.policy.offload_activations else self.stream()
        if self.policy.recompute == "selective":
            return self.selective_layer().total
        return self.layer().total

    def _recomputed_layer(self) -> float:
        """With "full", the layer whose backward pass runs, computed again, and its output; its
        input is kept already, unless the norm keeps a copy in another type, or it waits in host
        memory."""
        if self.policy.recompute != "full":
            return 0.0
        copied = not self.kernels.fused_norm and self.width < 4
        return self.layer().total + self.stream() * (copied + self.policy.offload_activations)

    def _mlp_backward(self) -> float:
        """Gradients of the output, of the product and of one of its factors; [L, h] gathered."""
        found = self.stream() + 2 * self.ffn * self.tokens * self.width
        if self.policy.recompute == "selective":  # the MLP computed again, and its output
            return found + self.layer().total - self.selective_layer().total + self.stream()
        return found + self._recomputed_layer()

    def _attn_backward(self) -> float:
        """The MLP's part is free again; gradients of output, queries, keys and values with one
        piece's."""
        kept = self.selective_layer() if self.policy.recompute == "selective" else self.layer()
        w, keys = self.width, self._row_keys()
        piece = keys if self.kernels.grouped_attention else keys * self.q / self.kv
        found = 2 * self.stream() + 3 * self.q * self.tokens * w + keys + piece
        if self.gathered:
            found += keys  # un-ordered again on the way back to the ranks
        mlp_norm = kept.norms - self._norms() / 2
        return found + self._recomputed_layer() - kept.mlp - mlp_norm

    def _block_forward(self) -> float:
        if self.width == 4:
            return 8 * self.kernels.block_elements
        return 8 * self.kernels.block_elements + (4 + self.width) * self._block()

    def _block_backward(self) -> float:
        """Float32 gradients of the head's inputs and weight, and a block of logits; or the two
        gradients once more in their own type."""
        inputs, weight = (
            self._predicted() * self.shape.hidden_size,
            self.vocab * self.shape.hidden_size,
        )
        found = 4 * (inputs + weight)
        block = 8 * self.kernels.block_elements
        if self.width == 4:
            return found + block
        columns = self._block() / max(1, min(self._predicted(), BLOCK_TOKENS))
        product = columns * self.shape.hidden_size * self.width
        block += self._block() * (4 + self.width) + product
        return found + max(block, self.width * (inputs + weight))

    def _block(self) -> float:
        """Logits of the largest block, no larger than there are tokens and vocabulary."""
        tokens = max(1, min(self._predicted(), BLOCK_TOKENS))
        return tokens * min(self.kernels.block_elements // tokens, self.vocab)
