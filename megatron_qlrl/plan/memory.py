"""Counts the memory of one rank by part, from the model's shape and the layout alone (no torch).

What foreign code takes on a GPU is not counted but assumed, by named numbers in `hardware.py`.
`tests/dist_cpu/test_plan_memory.py` compares the counts with real updates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_qlrl.config.schema import PolicyConfig
from megatron_qlrl.config.shape import ModelShape, padded_vocab
from megatron_qlrl.plan.activations import Activations

FLOAT32 = 4


@dataclass(frozen=True)
class Peak:
    """A rank's bytes by part at its fullest moment."""

    moment: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def stage_parameters(shape: ModelShape, *, tp: int, pp: int, stage: int) -> list[int]:
    """Returns the sizes (in elements) of a pipeline stage's tensors on one tensor parallel rank, in
    model order."""
    h, d, f = shape.hidden_size, shape.head_dim, shape.ffn_size // tp
    q, kv = shape.num_heads * d // tp, shape.num_kv_heads * d // tp
    vocab = padded_vocab(shape.vocab_size, tp) // tp * h
    layer = [h, q * h, (q + 2 * kv) * h]
    layer += [q + 2 * kv] if shape.qkv_bias else []
    layer += [d, d] if shape.qk_norm else []
    layer += [h, 2 * f * h, f * h]
    numels = [vocab] if stage == 0 else []
    numels += layer * (shape.num_layers // pp)
    if stage == pp - 1:
        # A tied LM head is the embedding, or a copy of it on another stage.
        numels += [h] if shape.tied and pp == 1 else [h, vocab]
    return numels


def model_state(
    numels: Sequence[int], policy: PolicyConfig, *, width: int, dp: int
) -> dict[str, float]:
    """Returns the bytes of weights, float32 gradients, and Adam's state with the float32 copy of
    bfloat16 weights.

    The distributed optimizer splits the state over all data and context parallel ranks.
    """
    num = sum(numels)
    state = FLOAT32 * (2 if width == FLOAT32 else 3) * num
    parts = {
        "weights": float(width * num),
        "gradients": float(FLOAT32 * num),
        "optimizer": state / (dp * policy.cp if policy.distributed_optimizer else 1),
    }
    if policy.fp8 != "off":
        # Transformer Engine keeps each quantized weight and its transpose, a byte each. This is an
        # upper bound: embedding and LM head are not quantized.
        parts["FP8 weights"] = 2.0 * num
    return parts


def in_flight(policy: PolicyConfig, *, micro_batches: int, stage: int) -> int:
    """Returns how many micro-batches a stage holds when a backward pass starts, under 1F1B."""
    return min(policy.pp - stage, micro_batches)


def update_peak(
    activations: Activations, *, dp: int, micro_batches: int, stage: int, offload: bool = False
) -> Peak:
    """Returns the fullest moment of an update on a stage. With `offload` the optimizer's state is
    on the device only during the optimizer step, after the last backward pass."""
    policy = activations.policy
    numels = stage_parameters(activations.shape, tp=policy.tp, pp=policy.pp, stage=stage)
    state = model_state(numels, policy, width=activations.width, dp=dp)
    step = Peak("optimizer step", state | {"working memory": activations.gather_buffer()})
    if offload:
        state = without(state, "optimizer")
    running = in_flight(policy, micro_batches=micro_batches, stage=stage)
    working = activations.working(stage)
    moment = max(working, key=lambda name: working[name])
    # The gradient just sent to the previous stage, and the next input from there.
    passing = 2 * activations.stream() if stage else 0.0
    backward = Peak(
        moment,
        state
        | {
            "activations": running * activations.stage(stage),
            "working memory": working[moment] + passing + activations.gather_buffer(),
        },
    )
    return max(backward, step, key=lambda peak: peak.total)


def without(parts: Mapping[str, float], *names: str) -> dict[str, float]:
    """Returns the parts apart from those named."""
    return {name: size for name, size in parts.items() if name not in names}


def stream_peak(shape: ModelShape, policy: PolicyConfig, *, width: int, bucket_bytes: int) -> float:
    """Returns the peak of the weight stream (weights/stream.py): the bucket that is gathered, this
    rank's part of it, and the bucket and tensor before it, which the engine still reads."""
    largest = 0.0
    previous = copied = 0.0
    for stage in range(policy.pp):
        numels = stage_parameters(shape, tp=policy.tp, pp=policy.pp, stage=stage)
        limit = bucket_bytes // (width * policy.tp)
        for bucket in _buckets(numels, limit=limit):
            local = sum(bucket) * width
            largest = max(largest, previous + copied + local * (policy.tp + 1))
            previous, copied = local * policy.tp, max(bucket) * width * policy.tp
            largest = max(largest, previous + copied)
    return largest


def _buckets(numels: Sequence[int], *, limit: int) -> list[list[int]]:
    buckets: list[list[int]] = []
    for numel in numels:
        if buckets and sum(buckets[-1]) + numel <= limit:
            buckets[-1].append(numel)
        else:
            buckets.append([numel])
    return buckets
