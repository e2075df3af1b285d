"""Estimates the time of one RL step by part: counted FLOPs and bytes over the rates that
`hardware.py` assumes.

The judge, saving, evaluation and transfers between pipeline stages are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_qlrl.config.schema import Config
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.plan.flops import (
    UPDATE_TO_FORWARD,
    block_flops,
    head_flops,
    linear_flops,
    mlp_flops,
)
from megatron_qlrl.plan.hardware import Hardware
from megatron_qlrl.plan.memory import expert_parameters

MAX_SEQUENCES = 256
"""The number of sequences that vLLM computes at one time by default."""


@dataclass(frozen=True)
class Lengths:
    """The mean lengths in tokens for which a step is estimated."""

    prompt: int
    response: int


@dataclass(frozen=True)
class Work:
    """The work of training on one rollout batch, for all GPUs together.

    Attributes:
        tokens: tokens of all rows.
        forward: model FLOPs of one forward pass over the batch.
        separate: `forward` if each prompt were computed again for each of its responses.
        linear: the part of `forward` that runs in FP8 if policy.fp8 is on.
        update: FLOPs that the updates execute: three forward passes, the logits once more, and
            what is recomputed.
        idle: the factor by which pipeline bubbles and ranks without a row lengthen the time.
    """

    tokens: float
    forward: float
    separate: float
    linear: float
    update: float
    idle: float


@dataclass(frozen=True)
class Engine:
    """The speed of one rollout engine by the plan's rates.

    Attributes:
        slots: sequences that its cache and vLLM let it run at one time, in the mean.
        step_s: seconds of a step that samples a token of each sequence, without reading the cache.
        token_s: seconds to read one token's keys and values.
        flops: FLOP/s of reading prompts.
    """

    shape: ModelShape
    slots: float
    step_s: float
    token_s: float
    flops: float

    def read_s(self, prompt: int, begun: Sequence[int] = ()) -> float:
        """Returns the seconds to read a prompt, and behind it what its responses have so far."""
        answers = block_flops(self.shape, prompt, begun) - head_flops(self.shape, sum(begun))
        return answers / self.flops


def training_work(config: Config, shape: ModelShape, *, gpus: int, lengths: Lengths) -> Work:
    """Returns the work of training on one rollout batch of these mean lengths."""
    policy, rollout = config.policy, config.rollout
    parts = _parts(config, lengths)
    each = [lengths.response] * -(-rollout.group_size // parts)
    blocks = parts * rollout.prompts_per_step
    tokens = blocks * (lengths.prompt + sum(each))
    forward = blocks * block_flops(shape, lengths.prompt, each)
    head = head_flops(shape, blocks * sum(each))
    linear = shape.num_layers * linear_flops(shape) * tokens
    mlp = shape.num_layers * mlp_flops(shape) * tokens
    recomputed = {"none": 0.0, "selective": mlp, "full": forward - head}
    alone = block_flops(shape, lengths.prompt, [lengths.response])
    return Work(
        tokens=tokens,
        forward=forward,
        separate=rollout.prompts_per_step * rollout.group_size * alone,
        linear=linear,
        update=UPDATE_TO_FORWARD * forward + head + recomputed[policy.recompute],
        idle=_idle(config, tokens, gpus),
    )


def training_seconds(
    config: Config, shape: ModelShape, work: Work, *, gpus: int, hardware: Hardware, width: int,
    weight_bytes: float,
) -> dict[str, float]:  # fmt: skip
    """Returns the seconds of the updates and of the passes before them, by part."""
    policy, algorithm = config.policy, config.algorithm
    model_ranks = policy.tp * policy.pp
    experts = expert_parameters(shape)
    held = (weight_bytes / width - experts) / model_ranks + experts / (policy.pp * policy.ep)
    bf16 = hardware.bf16_flops * hardware.training_efficiency
    linear = bf16
    if policy.fp8 != "off":
        linear = hardware.fp8_flops * hardware.fp8_efficiency
    flop_s = (work.linear / linear + (work.forward - work.linear) / bf16) / work.forward / gpus
    rows = work.tokens * model_ranks * policy.cp / gpus * shape.num_layers / policy.pp
    tp_s, cp_s = _exchange(config, shape, hardware, width)
    ep_s = _expert_exchange(config, shape, hardware, width)
    # The backward pass gathers the inputs again, runs every collective's opposite, and repeats what
    # recomputation needs; the MLP has half of tp's collectives, experts none of them.
    tp_again, cp_again = {"none": (0, 0), "selective": (0.5, 0), "full": (1, 1)}[policy.recompute]
    if shape.experts and policy.recompute == "selective":
        tp_again = 0
    ep_again = 0 if policy.recompute == "none" else 1
    links = rows * (tp_s * (2.5 + tp_again) + cp_s * (2 + cp_again) + ep_s * (2 + ep_again))
    if policy.offload_activations:  # each layer's input is copied to the host and back
        shards = policy.cp * (policy.tp if policy.sequence_parallel else 1)
        links += rows * 2 * shape.hidden_size * width / shards / hardware.pinned_copy
    seconds = {"updates": (work.update * flop_s + links) * work.idle}
    if config.optimizer.offload:  # moments and float32 weights are copied to the device and back
        state = 12 * (weight_bytes / width / gpus if policy.distributed_optimizer else held)
        seconds["updates"] += algorithm.updates_per_step * 2 * state / hardware.host_copy
    # Gradients are reduced in float32, and the new weights gathered.
    reduced = held * (4 + width)
    if gpus > model_ranks:
        rate = hardware.network if gpus > hardware.gpus_per_node else hardware.nvlink
        rate *= hardware.link_efficiency
        seconds["updates"] += algorithm.updates_per_step * reduced / rate
    one_pass = (work.forward * flop_s + rows * (tp_s + cp_s + ep_s)) * work.idle
    if algorithm.reference:
        # Policy and reference swap places with host memory twice, and each swap is two copies.
        swaps = 4 * held * width / hardware.host_copy
        seconds["reference"] = (one_pass + swaps) / algorithm.reference_every
    if algorithm.updates_per_step > 1:  # the first mini-batch's are those of its own update
        seconds["old log-probs"] = one_pass * (1 - 1 / algorithm.updates_per_step)
    return seconds


def _exchange(
    config: Config, shape: ModelShape, hardware: Hardware, width: int
) -> tuple[float, float]:
    """Returns the seconds per row token of a layer's forward collectives: over tp the hidden
    states (four gathers or scatters, of which two are the MLP's), over cp the keys and values."""
    tp, cp = config.policy.tp, config.policy.cp
    nvlink = hardware.nvlink * hardware.link_efficiency
    far = nvlink if tp * cp <= hardware.gpus_per_node else (
        hardware.network * hardware.link_efficiency
    )  # fmt: skip
    times = 2 if shape.experts else 4  # experts take each rank's own tokens
    hidden = times * shape.hidden_size * width / cp * (tp - 1) / tp
    keys = 2 * shape.num_kv_heads * shape.head_dim * width / tp * (cp - 1) / cp
    return hidden / nvlink, keys / far


def _expert_exchange(config: Config, shape: ModelShape, hardware: Hardware, width: int) -> float:
    """Returns the seconds per row token in which a layer's forward pass sends tokens to their
    experts and back."""
    policy = config.policy
    if shape.experts is None:
        return 0.0
    sent = 2 * shape.experts.per_token * shape.hidden_size * width / (policy.tp * policy.cp)
    rate = hardware.nvlink if policy.ep <= hardware.gpus_per_node else hardware.network
    return sent * (policy.ep - 1) / policy.ep / (rate * hardware.link_efficiency)


def make_engine(
    config: Config, shape: ModelShape, *, hardware: Hardware, lengths: Lengths,
    cache_tokens: float, width: int, weight_bytes: float,
) -> Engine:  # fmt: skip
    """Returns an engine of `rollout.tp` GPUs whose cache holds sequences of these mean lengths; a
    prompt is in it once for its group."""
    tp = config.rollout.tp
    room = cache_tokens / (lengths.prompt / config.rollout.group_size + lengths.response)
    bandwidth = tp * hardware.bandwidth * hardware.decode_efficiency
    return Engine(
        shape,
        slots=max(1.0, min(room, MAX_SEQUENCES)),
        step_s=weight_bytes / bandwidth + hardware.decode_step_s,
        token_s=cache_bytes(shape, width) / bandwidth,
        flops=tp * hardware.bf16_flops * hardware.prefill_efficiency,
    )


def generation_seconds(
    config: Config, engine: Engine, *, gpus: int, hardware: Hardware, lengths: Lengths,
    weight_bytes: float,
) -> dict[str, float]:  # fmt: skip
    """Returns the seconds to send the weights, to read the prompts (each once, because its group
    shares the cache) and to generate: every engine step reads the weights and the cache."""
    engines = gpus / config.rollout.tp
    prompts = config.rollout.prompts_per_step / engines
    sequences = prompts * config.rollout.group_size
    at_once = max(1.0, min(sequences, engine.slots))
    context = lengths.prompt + lengths.response / 2
    step_s = engine.step_s + at_once * context * engine.token_s
    return {
        "weight stream": weight_bytes / hardware.network,
        "prompts": prompts * engine.read_s(lengths.prompt),
        "generation": max(sequences / at_once, 1.0) * lengths.response * step_s,
    }


def cache_bytes(shape: ModelShape, width: int) -> float:
    """Returns the size of one token's keys and values in all layers."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * width


def _parts(config: Config, lengths: Lengths) -> int:
    """Returns over how many rows a group is spread; each of them computes the prompt."""
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
