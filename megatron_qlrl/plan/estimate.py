"""Time of one RL step by part: counted FLOPs and bytes over the rates assumed in `hardware.py`.

Left out: the judge, saving, evaluation and the transfers between pipeline stages.
"""

from dataclasses import dataclass

from megatron_qlrl.config.schema import Config
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.plan.flops import (
    UPDATE_TO_FORWARD,
    block_flops,
    head_flops,
    linear_flops,
    mlp_flops,
    prefill_flops,
)
from megatron_qlrl.plan.hardware import Hardware

MAX_SEQUENCES = 256
"""Sequences that vLLM computes at one time by default."""


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of prompts and of responses that a step is estimated for."""

    prompt: int
    response: int


@dataclass(frozen=True)
class Work:
    """The training of one rollout batch, for all GPUs together.

    Attributes:
        tokens: of all rows.
        forward: model FLOPs of one forward pass over the batch.
        separate: the same with each prompt computed once for each of its responses.
        linear: those of `forward` that are FP8 where policy.fp8 is on.
        update: FLOPs that the updates execute: three forward passes, the logits once more, and
            what is recomputed.
        idle: time lost to pipeline bubbles and to ranks without a row, as a factor.
    """

    tokens: float
    forward: float
    separate: float
    linear: float
    update: float
    idle: float


def training_work(config: Config, shape: ModelShape, *, gpus: int, lengths: Lengths) -> Work:
    policy, rollout = config.policy, config.rollout
    parts = _parts(config, lengths)
    each = [lengths.response] * -(-rollout.group_size // parts)
    blocks = parts * rollout.prompts_per_step
    tokens = blocks * (lengths.prompt + sum(each))
    forward = blocks * block_flops(shape, lengths.prompt, each)
    head = head_flops(shape, blocks * sum(each))
    linear = shape.num_layers * linear_flops(shape) * tokens
    mlp = shape.num_layers * mlp_flops(shape) * tokens
    again = {"none": 0.0, "selective": mlp, "full": forward - head}
    alone = block_flops(shape, lengths.prompt, [lengths.response])
    return Work(
        tokens=tokens,
        forward=forward,
        separate=rollout.prompts_per_step * rollout.group_size * alone,
        linear=linear,
        update=UPDATE_TO_FORWARD * forward + head + again[policy.recompute],
        idle=_idle(config, tokens, gpus),
    )


def training_seconds(
    config: Config, shape: ModelShape, work: Work, *, gpus: int, hardware: Hardware, width: int,
    weight_bytes: float,
) -> dict[str, float]:  # fmt: skip
    """Seconds of the updates and of the passes before them."""
    policy, algorithm = config.policy, config.algorithm
    model_ranks = policy.tp * policy.pp
    bf16 = hardware.bf16_flops * hardware.training_efficiency
    linear = bf16
    if policy.fp8 != "off":
        linear = hardware.fp8_flops * hardware.fp8_efficiency
    flop_s = (work.linear / linear + (work.forward - work.linear) / bf16) / work.forward / gpus
    rows = work.tokens * model_ranks * policy.cp / gpus * shape.num_layers / policy.pp
    tp_s, cp_s = _exchange(config, shape, hardware, width)
    # Backward: the gathers of the inputs again, every collective's opposite, and what recomputation
    # repeats: the MLP has half of tp's.
    tp_again, cp_again = {"none": (0, 0), "selective": (0.5, 0), "full": (1, 1)}[policy.recompute]
    links = rows * (tp_s * (2.5 + tp_again) + cp_s * (2 + cp_again))
    if policy.offload_activations:  # out and in
        shards = policy.cp * (policy.tp if policy.sequence_parallel else 1)
        links += rows * 2 * shape.hidden_size * width / shards / hardware.pinned_copy
    found = {"updates": (work.update * flop_s + links) * work.idle}
    if config.optimizer.offload:
        # In and out: the moments and the float32 weights.
        shards = gpus if policy.distributed_optimizer else model_ranks
        state = 12 * weight_bytes / width / shards
        found["updates"] += algorithm.updates_per_step * 2 * state / hardware.host_copy
    # Gradients are reduced in float32, and the new weights gathered.
    reduced = weight_bytes / width * (4 + width) / model_ranks
    if gpus > model_ranks:
        rate = hardware.network if gpus > hardware.gpus_per_node else hardware.nvlink
        found["updates"] += algorithm.updates_per_step * reduced / (rate * hardware.link_efficiency)
    one_pass = (work.forward * flop_s + rows * (tp_s + cp_s)) * work.idle
    if algorithm.reference:
        # It waits in host memory: in and out again, each way a copy both ways.
        found["reference"] = one_pass + 4 * weight_bytes / model_ranks / hardware.host_copy
    if algorithm.updates_per_step > 1:
        found["old log-probs"] = one_pass
    return found


def _exchange(
    config: Config, shape: ModelShape, hardware: Hardware, width: int
) -> tuple[float, float]:
    """Seconds of a layer's forward collectives for each token of a row: over tp the hidden states
    (four gathers or scatters), over cp the keys and values."""
    tp, cp = config.policy.tp, config.policy.cp
    nvlink = hardware.nvlink * hardware.link_efficiency
    far = nvlink if tp * cp <= hardware.gpus_per_node else (
        hardware.network * hardware.link_efficiency
    )  # fmt: skip
    hidden = 4 * shape.hidden_size * width / cp * (tp - 1) / tp
    keys = 2 * shape.num_kv_heads * shape.head_dim * width / tp * (cp - 1) / cp
    return hidden / nvlink, keys / far


def generation_seconds(
    config: Config,
    shape: ModelShape,
    *,
    gpus: int,
    hardware: Hardware,
    lengths: Lengths,
    cache_tokens: float,
    width: int,
    weight_bytes: float,
) -> dict[str, float]:
    """Seconds to send the weights, to read the prompts (each once: the group shares its cache) and
    to generate: every step of the engine reads the weights and the cache of what it runs."""
    tp = config.rollout.tp
    engines = gpus / tp
    sequences = config.rollout.prompts_per_step * config.rollout.group_size / engines
    room = cache_tokens / (lengths.prompt / config.rollout.group_size + lengths.response)
    at_once = max(1.0, min(sequences, room, MAX_SEQUENCES))
    context = lengths.prompt + lengths.response / 2
    read = weight_bytes + at_once * context * cache_bytes(shape, width)
    step_s = read / (tp * hardware.bandwidth * hardware.decode_efficiency) + hardware.decode_step_s
    prompts = config.rollout.prompts_per_step / engines
    rate = tp * hardware.bf16_flops * hardware.prefill_efficiency
    return {
        "weight stream": weight_bytes / hardware.network,
        "prompts": prompts * prefill_flops(shape, lengths.prompt) / rate,
        "generation": max(sequences / at_once, 1.0) * lengths.response * step_s,
    }


def cache_bytes(shape: ModelShape, width: int) -> float:
    """Of one token's keys and values in all layers."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * width


def _parts(config: Config, lengths: Lengths) -> int:
    """Rows over which one group is spread, so often its prompt is computed."""
    if not config.policy.share_prompts:
        return config.rollout.group_size
    room = max((config.policy.max_tokens_per_row - lengths.prompt) // lengths.response, 1)
    return -(-config.rollout.group_size // room)


def _idle(config: Config, tokens: float, gpus: int) -> float:
    policy = config.policy
    ranks = gpus / (policy.tp * policy.pp * policy.cp)
    rows = max(tokens / config.algorithm.updates_per_step / policy.max_tokens_per_row, 1.0)
    each = max(rows / ranks, 1.0)
    bubble = (each + policy.pp - 1) / each
    return bubble * each * ranks / rows
