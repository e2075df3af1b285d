"""Memory of one rank by part, from the model's shape and the layout alone (no torch).

Everything is counted exactly but what depends on other people's code on a GPU, which is one
named number each in `hardware.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_qlrl.config.schema import PolicyConfig
from megatron_qlrl.config.shape import ModelShape, padded_vocab
from megatron_qlrl.plan.activations import Activations

FLOAT32 = 4


@dataclass(frozen=True)
class Peak:
    """Bytes of a rank by part, and the moment at which they are all there."""

    moment: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def stage_parameters(shape: ModelShape, *, tp: int, pp: int, stage: int) -> list[int]:
    """Sizes of the tensors of one pipeline stage on one tensor parallel rank, in model order."""
    h, d, f = shape.hidden_size, shape.head_dim, shape.ffn_size // tp
    q, kv = shape.num_heads * d // tp, shape.num_kv_heads * d // tp
    vocab = padded_vocab(shape.vocab_size, tp) // tp * h
    layer = [h, q * h, (q + 2 * kv) * h]
    layer += [q + 2 * kv] if shape.qkv_bias else []
    layer += [d, d] if shape.qk_norm else []
    layer += [h, 2 * f * h, f * h]
    found = [vocab] if stage == 0 else []
    found += layer * (shape.num_layers // pp)
    if stage == pp - 1:
        # A tied LM head is the embedding, or on a stage of its own a copy of it.
        found += [h] if shape.tied and pp == 1 else [h, vocab]
    return found


def model_state(
    num: int, policy: PolicyConfig, *, width: int, dp: int, fp8_weights: int = 0
) -> dict[str, float]:
    """Weights, gradients (float32) and Adam's state with the float32 copy of bfloat16 weights.

    The distributed optimizer cuts the last over data and context parallel ranks together.
    """
    state = FLOAT32 * (2 if width == FLOAT32 else 3) * num
    found = {
        "weights": float(width * num),
        "gradients": float(FLOAT32 * num),
        "optimizer": state / (dp * policy.cp if policy.distributed_optimizer else 1),
    }
    if policy.fp8 != "off":
        # Transformer Engine keeps each quantized weight and its transpose, a byte each.
        found["FP8 weights"] = 2.0 * fp8_weights
    return found


def training_peak(activations: Activations, *, dp: int, micro_batches: int, stage: int) -> Peak:
    """The fullest moment of an update on a stage: 1F1B has `pp - stage` micro-batches in flight
    (or all there are) when the first backward pass starts."""
    policy, shape = activations.policy, activations.shape
    numels = stage_parameters(shape, tp=policy.tp, pp=policy.pp, stage=stage)
    linear = sum(n for n in numels if n >= shape.hidden_size**2 // policy.tp)
    state = model_state(sum(numels), policy, width=activations.width, dp=dp, fp8_weights=linear)
    in_flight = min(policy.pp - stage, micro_batches)
    working = activations.working(stage)
    moment = max(working, key=lambda name: working[name])
    return Peak(
        moment,
        state
        | {
            "activations": in_flight * activations.stage(stage),
            "working": working[moment],
            "gather buffer": activations.gather_buffer(),
        },
    )
