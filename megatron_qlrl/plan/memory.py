"""Counts the memory of one rank by part, from the model's shape and the layout alone (no torch).

What foreign code takes on a GPU is not counted but assumed, by named numbers in `hardware.py`.
`tests/dist_cpu/test_plan_memory.py` compares the counts with real updates.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_qlrl.config.schema import PolicyConfig
from megatron_qlrl.config.shape import Experts, ModelShape, padded_vocab
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


def stage_parameters(shape: ModelShape, *, tp: int, pp: int, stage: int, ep: int = 1) -> list[int]:
    """Returns the sizes (in elements) of a pipeline stage's tensors on one rank, in model order."""
    h, d = shape.hidden_size, shape.head_dim
    q, kv = shape.num_heads * d // tp, shape.num_kv_heads * d // tp
    vocab = padded_vocab(shape.vocab_size, tp) // tp * h
    layer = [h, q * h, (q + 2 * kv) * h]
    layer += [q + 2 * kv] if shape.qkv_bias else []
    layer += [d, d] if shape.qk_norm else []
    if shape.experts:
        f, num = shape.experts.ffn_size, shape.experts.num
        layer += [h, num * h, *[2 * f * h, f * h] * (num // ep)]
    else:
        f = shape.ffn_size // tp
        layer += [h, 2 * f * h, f * h]
    numels = [vocab] if stage == 0 else []
    numels += layer * (shape.num_layers // pp)
    if stage == pp - 1:
        # A tied LM head is the embedding, or a copy of it on another stage.
        numels += [h] if shape.tied and pp == 1 else [h, vocab]
    return numels


def expert_parameters(shape: ModelShape, *, pp: int = 1, ep: int = 1) -> int:
    """Returns the elements of the experts on one rank; 0 for a dense model."""
    if shape.experts is None:
        return 0
    each = 3 * shape.experts.ffn_size * shape.hidden_size
    return shape.num_layers // pp * (shape.experts.num // ep) * each


def active_parameters(shape: ModelShape) -> int:
    """Returns the elements of the whole model that one token uses."""
    num = sum(stage_parameters(shape, tp=1, pp=1, stage=0))
    if shape.experts is None:
        return num
    idle = 1 - shape.experts.per_token / shape.experts.num
    return num - round(expert_parameters(shape) * idle)


def stage_state(
    shape: ModelShape, policy: PolicyConfig, *, stage: int, width: int, dp: int
) -> dict[str, float]:
    """Returns `model_state` of a rank of a pipeline stage."""
    numels = stage_parameters(shape, tp=policy.tp, pp=policy.pp, stage=stage, ep=policy.ep)
    experts = expert_parameters(shape, pp=policy.pp, ep=policy.ep)
    return model_state(numels, policy, width=width, dp=dp, experts=experts)


def model_state(
    numels: Sequence[int], policy: PolicyConfig, *, width: int, dp: int, experts: int = 0
) -> dict[str, float]:
    """Returns the bytes of weights, float32 gradients, and Adam's state with the float32 copy of
    bfloat16 weights.

    The distributed optimizer splits the state over all data and context parallel ranks, and that of
    the experts (`experts` of the elements) over all ranks of the stage that hold the same ones.
    """
    num = sum(numels)
    state = FLOAT32 * (2 if width == FLOAT32 else 3)
    replicas = dp * policy.cp if policy.distributed_optimizer else 1
    same = dp * policy.cp * policy.tp / policy.ep if policy.distributed_optimizer else 1
    parts = {
        "weights": float(width * num),
        "gradients": float(FLOAT32 * num),
        "optimizer": state * ((num - experts) / replicas + experts / same),
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
    state = stage_state(activations.shape, policy, stage=stage, width=activations.width, dp=dp)
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
    rank's part of it, and the bucket and tensor before it, which the engine still reads; of experts
    it keeps what it has been given of a layer until that is complete."""
    largest = 0.0
    previous = copied = 0.0
    for numels, ranks, layer in _streamed(shape, policy):
        for bucket in _buckets(numels, limit=bucket_bytes // (width * ranks)):
            local = sum(bucket) * width
            read = layer * width or previous + copied
            largest = max(largest, read + local * (ranks + 1))
            previous, copied = local * ranks, max(bucket) * width * ranks
            largest = max(largest, previous + copied)
    return largest


def _streamed(shape: ModelShape, policy: PolicyConfig) -> Iterator[tuple[list[int], int, int]]:
    """Yields the tensors of each stage, the ranks over which they are gathered, and the elements
    that the engine keeps until a layer is complete. The experts come last."""
    dense = replace(shape, experts=Experts(1, 1, 0, False)) if shape.experts else shape
    for stage in range(policy.pp):
        yield stage_parameters(dense, tp=policy.tp, pp=policy.pp, stage=stage), policy.tp, 0
    if shape.experts:
        each = [part * shape.experts.ffn_size * shape.hidden_size for part in (2, 1)]
        layer = shape.experts.num * sum(each)
        layers = shape.num_layers // policy.pp
        for _ in range(policy.pp):
            yield each * (layers * shape.experts.num // policy.ep), policy.ep, layer


def _buckets(numels: Sequence[int], *, limit: int) -> list[list[int]]:
    buckets: list[list[int]] = []
    for numel in numels:
        if buckets and sum(buckets[-1]) + numel <= limit:
            buckets[-1].append(numel)
        else:
            buckets.append([numel])
    return buckets
