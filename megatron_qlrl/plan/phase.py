"""Plans one phase: memory while training and while generating, what does not fit, and time."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_qlrl.config.schema import Config, PolicyConfig
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.plan.activations import GPU, Activations, Row
from megatron_qlrl.plan.estimate import (
    Engine,
    Lengths,
    Work,
    cache_bytes,
    generation_seconds,
    make_engine,
    training_seconds,
    training_work,
)
from megatron_qlrl.plan.hardware import GIB, Hardware
from megatron_qlrl.plan.memory import (
    Peak,
    expert_parameters,
    in_flight,
    stage_parameters,
    stage_state,
    stream_peak,
    update_peak,
    without,
)

ENGINE_PARTS = ("engine's weights", "weight stream", "engine's share")
"""The parts of a rollout's peak that the engine frees while it sleeps."""

WIDTHS = {None: 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Cluster:
    """The GPUs for which a plan is made."""

    gpus: int
    hardware: Hardware


@dataclass(frozen=True)
class PhasePlan:
    """A phase's plan; bytes are those of the fullest rank.

    Attributes:
        config: the phase's own config, with its overrides applied.
        dp: data parallel size.
        stage: the fullest pipeline stage.
        rollout: None if nothing is generated (SFT).
        engine: the speed of one engine at these lengths; None if nothing is generated.
        cache_tokens: tokens that one engine's key/value cache holds.
        longest: tokens that it must hold at least.
        host: bytes in a node's host memory by part, if all its ranks are like the fullest.
        problems: what does not fit.
        seconds: the seconds of a step by part.
    """

    name: str
    config: Config
    dp: int
    row: Row
    stage: int
    update: Peak
    rollout: Peak | None
    engine: Engine | None
    cache_tokens: float
    longest: int
    host: Mapping[str, float]
    problems: tuple[str, ...]
    lengths: Lengths
    work: Work
    seconds: Mapping[str, float]

    @property
    def steps(self) -> int:
        return self.config.phases[-1].steps if self.config.phases else 0

    def gpu_hours(self, gpus: int) -> float:
        return sum(self.seconds.values()) * self.steps * gpus / 3600


def plan_phase(
    config: Config, shape: ModelShape, cluster: Cluster, *, lengths: Lengths | None = None
) -> PhasePlan:
    """Returns the plan of a phase's own config (`Config.for_phase`), or of SFT if it has no phases.

    Args:
        lengths: mean lengths for the time; by default those of the longest prompt and response,
            which make the costliest step.
    """
    policy, hardware = config.policy, cluster.hardware
    width = WIDTHS[config.model.dtype]
    dp = max(cluster.gpus // (policy.tp * policy.pp * policy.cp), 1)
    row = longest_row(config)
    activations = Activations(shape, policy, row, width=width, kernels=GPU)
    peaks = [
        _with_allowance(
            update_peak(
                activations,
                dp=dp,
                micro_batches=policy.pp,
                stage=stage,
                offload=config.optimizer.offload,
            ),
            hardware,
        )
        for stage in range(policy.pp)
    ]
    stage = max(range(policy.pp), key=lambda s: peaks[s].total)
    weights = sum(stage_parameters(shape.untied, tp=1, pp=1, stage=0)) * width
    longest = min(config.longest_generation, shape.max_positions)
    rollout, cache_tokens = None, 0.0
    if config.phases:
        rollout = _rollout_peak(config, shape, hardware, dp=dp, width=width, weights=weights)
        share = config.rollout.gpu_memory_utilization * hardware.memory_bytes
        free = (share - hardware.engine_bytes) * config.rollout.tp - weights
        cache_tokens = max(free, 0.0) / cache_bytes(shape, width)
    lengths = lengths or Lengths(config.max_input_tokens, config.rollout.max_response_tokens)
    work = training_work(config, shape, gpus=cluster.gpus, lengths=lengths)
    seconds: dict[str, float] = {}
    engine = None
    if config.phases:
        engine = make_engine(
            config, shape, hardware=hardware, lengths=lengths, cache_tokens=cache_tokens,
            width=width, weight_bytes=weights,
        )  # fmt: skip
        seconds = generation_seconds(
            config, engine, gpus=cluster.gpus, hardware=hardware, lengths=lengths,
            weight_bytes=weights,
        ) | training_seconds(
            config, shape, work, gpus=cluster.gpus, hardware=hardware, width=width,
            weight_bytes=weights,
        )  # fmt: skip
    return PhasePlan(
        name=config.phases[-1].name if config.phases else "sft",
        config=config,
        dp=dp,
        row=row,
        stage=stage,
        update=peaks[stage],
        rollout=rollout,
        engine=engine,
        cache_tokens=cache_tokens,
        longest=longest,
        host=_host(config, activations, cluster, dp=dp),
        problems=tuple(_problems(config, peaks[stage], rollout, cache_tokens, longest, hardware)),
        lengths=lengths,
        work=work,
        seconds=seconds,
    )


def longest_row(config: Config) -> Row:
    """Returns a full row with as many response tokens as the phase allows. Its prompts are longer
    than those of the phase before, unless prompts are carried over."""
    tokens = config.policy.max_tokens_per_row
    shortest = 1
    if len(config.phases) > 1 and not config.curriculum.carried_share:
        shortest = config.phases[-2].max_input_tokens + 1
    if not config.phases:
        return Row(tokens, tokens - 1)
    group = config.rollout.group_size * config.rollout.max_response_tokens
    # A row needs no more prompts than fill it with whole groups; more would displace responses.
    counts = range(1, tokens // (group + shortest) + 2)
    return Row(tokens, max(min(tokens - k * shortest, k * group) for k in counts))


def _with_allowance(peak: Peak, hardware: Hardware) -> Peak:
    """Returns the peak with the parts that are assumed instead of counted."""
    moving = peak.parts.get("activations", 0.0) + peak.parts["working memory"]
    return Peak(
        peak.moment,
        {
            **peak.parts,
            "fragmentation": hardware.fragmentation * moving,
            "framework, sleeping engine": hardware.framework_bytes + hardware.asleep_bytes,
        },
    )


def _host(
    config: Config, activations: Activations, cluster: Cluster, *, dp: int
) -> dict[str, float]:
    """Returns the bytes by part in the host memory of a node whose ranks are all like the
    fullest."""
    policy = config.policy
    ranks = min(cluster.gpus, cluster.hardware.gpus_per_node)
    nodes: list[dict[str, float]] = []
    for stage in range(policy.pp):
        state = stage_state(activations.shape, policy, stage=stage, width=activations.width, dp=dp)
        running = in_flight(policy, micro_batches=policy.pp, stage=stage)
        keeps = config.phases and config.algorithm.reference
        parts = {
            "reference": ranks * state["weights"] if keeps else 0.0,
            "optimizer": ranks * state["optimizer"] if config.optimizer.offload else 0.0,
            "layer inputs": ranks * running * activations.on_host(),
            "checkpoint": _checkpoint(
                state,
                policy,
                ranks=ranks,
                replicas=dp * policy.cp,
                experts=expert_parameters(activations.shape, pp=policy.pp, ep=policy.ep),
            ),
        }
        nodes.append({name: size for name, size in parts.items() if size})
    return max(nodes, key=lambda parts: sum(parts.values()))


def _checkpoint(
    state: Mapping[str, float], policy: PolicyConfig, *, ranks: int, replicas: int, experts: int
) -> float:
    """Returns a checkpoint's bytes in a node's host memory.

    One data parallel rank holds the weights and, without the distributed optimizer, Adam's three
    float32 tensors. With it each rank gathers, or reads, those of its own share of the parameters.
    `experts` of a rank's elements are divided among other ranks than the rest.
    """
    writers = min(ranks, policy.tp * max(1, ranks // (policy.tp * replicas)))
    if not policy.distributed_optimizer:
        return writers * (state["weights"] + state["optimizer"])
    of_experts = 4.0 * experts
    tensor = state["gradients"] - of_experts
    stage = replicas * policy.tp
    expert_writers = min(ranks, policy.ep * max(1, ranks // stage))
    written = writers * tensor + expert_writers * of_experts
    shares = ranks * 3 * (tensor / replicas + of_experts * policy.ep / stage)
    return written * state["weights"] / state["gradients"] + shares


def _rollout_peak(
    config: Config, shape: ModelShape, hardware: Hardware, *, dp: int, width: int, weights: float
) -> Peak:
    """Returns the peak with the engine awake beside the policy's state, whose gradients are freed:
    while the engine loads its weights from the stream, or while it uses its whole share."""
    policy = config.policy
    states = [
        stage_state(shape, policy, stage=stage, width=width, dp=dp) for stage in range(policy.pp)
    ]
    away = ("gradients", "optimizer") if config.optimizer.offload else ("gradients",)
    states = [without(parts, *away) for parts in states]
    state = max(states, key=lambda parts: sum(parts.values()))
    state = state | {"framework": hardware.framework_bytes}
    bucket = config.rollout.sync_bucket_mib * 2**20
    loading = {
        "engine's weights": weights / config.rollout.tp,
        "weight stream": stream_peak(shape, policy, width=width, bucket_bytes=bucket),
    }
    share = config.rollout.gpu_memory_utilization * hardware.memory_bytes
    if sum(loading.values()) > share:
        return Peak("loading weights", state | loading)
    return Peak("generating", state | {"engine's share": share})


def _problems(
    config: Config,
    update: Peak,
    rollout: Peak | None,
    cache_tokens: float,
    longest: int,
    hardware: Hardware,
) -> list[str]:
    has = hardware.memory_bytes
    problems = [
        f"the {name} needs {peak.total / GIB:.1f} GiB of {has / GIB:.1f} GiB (at: {peak.moment})"
        for name, peak in (("update", update), ("rollout", rollout))
        if peak is not None and peak.total > has
    ]
    if rollout is not None and cache_tokens < longest:
        problems.append(
            f"the engine's cache holds {cache_tokens:,.0f} tokens, and the longest prompt with "
            f"its response is {longest:,}"
        )
    return problems
