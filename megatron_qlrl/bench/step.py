"""Measures the parts of an RL step on a real model, each beside what the machine can do: weights
into the engine beside a copy of as many bytes; prefill, decode and update in FLOPs beside a matmul.

Prompts are random tokens. Times are by the clock and with all threads: measure on a quiet machine.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch

from megatron_qlrl import build
from megatron_qlrl.bench.measure import machine
from megatron_qlrl.bench.policy import LOSS, make_group
from megatron_qlrl.config.checks import check_layout
from megatron_qlrl.config.schema import Config
from megatron_qlrl.config.shape import read_shape
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.packing.distribute import group_rows
from megatron_qlrl.parallel.context import process_group
from megatron_qlrl.plan.flops import UPDATE_TO_FORWARD, block_flops, prefill_flops
from megatron_qlrl.platform.device import device, has_gpu, weight_dtype
from megatron_qlrl.platform.env import init_ranks
from megatron_qlrl.rollout.vllm_engine import Request, Sampling, VllmEngine


def bench_step(
    config: Config, *, prompt_tokens: int, response_tokens: int, rounds: int
) -> dict[str, Any]:
    """Returns medians over the rounds, after one round of warm-up. The config gives model, type,
    and `rollout.prompts_per_step` groups of `rollout.group_size`.

    Raises:
        ConfigError: the config takes no sequences of this length, or more than one process.
    """
    shape = read_shape(config.model.path, rope_scaling=config.model.rope_scaling)
    check_layout(config, shape, world_size=1)
    longest = min(config.longest_generation, config.policy.max_tokens_per_row, shape.max_positions)
    if prompt_tokens + response_tokens > longest:
        raise ConfigError(
            f"--prompt-tokens {prompt_tokens} and --response-tokens {response_tokens} are more "
            f"than the {longest} tokens that a sequence of this config can have; give fewer, or "
            "raise the last phase's max_input_tokens"
        )
    init_ranks()
    with process_group(rank=0, local_rank=0, world_size=1):
        job = build.make_job(config)
        with build.open_model(job, build.make_scorer(job), temperature=1.0) as model:
            return measure_step(job, model, prompt_tokens, response_tokens, rounds)


def measure_step(
    job: build.Job, model: build.Model, prompt_tokens: int, response_tokens: int, rounds: int
) -> dict[str, Any]:
    """Returns what `bench_step` does, of a model that is open."""
    config, shape = job.config, job.shape
    dtype = weight_dtype(config.model.dtype)
    size = config.rollout.group_size
    groups = [
        make_group(
            vocab=shape.vocab_size,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            group=size,
            seed=seed,
        )
        for seed in range(config.rollout.prompts_per_step)
    ]
    rows = [
        row
        for group in groups
        for row in group_rows(
            group,
            max_tokens=prompt_tokens + size * response_tokens,
            share_prompt=True,
            cost=partial(block_flops, shape),
        )
    ]
    engine = model.collector.engine()
    requests = [
        Request(group.prompt_ids, seed)
        for seed, group in enumerate(g for g in groups for _ in range(size))
    ]
    num_bytes = sum(p.nbytes for p in model.policy.model.parameters())
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device()).fill_(1)
    target = torch.empty_like(source)
    a = torch.randn(2048, shape.hidden_size, device=device()).to(getattr(torch, dtype))
    b = torch.randn(shape.ffn_size, shape.hidden_size, device=device()).to(a.dtype)
    parts: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "stream": lambda: deque(model.stream.for_engine(1), maxlen=0),
        "matmul": lambda: torch.nn.functional.linear(a, b),
        "update": lambda: model.policy.update(rows, LOSS, lr=0.0),
    }
    rollout = partial(_rollout, engine, model, requests, response_tokens)
    wall, counted = _medians(parts, rollout, rounds)
    forward = len(groups) * block_flops(shape, prompt_tokens, [response_tokens] * size)
    prefill = len(groups) * prefill_flops(shape, prompt_tokens)
    # Some responses end early, and steps that read prompts are counted as prefill.
    decoded = counted["decode_tokens"] / (len(requests) * response_tokens)
    decode = (forward - prefill) * decoded
    return {
        "bench": "step",
        "dtype": dtype,
        "groups": len(groups),
        "group_size": size,
        "prompt_tokens": prompt_tokens,
        "response_tokens": response_tokens,
        "matmul_flops_per_s": 2 * a.numel() * len(b) / wall["matmul"],
        "sync": {
            "bytes": num_bytes,
            "s": counted["sync_s"],
            "stream_s": wall["stream"],
            "copy_s": wall["copy"],
        },
        "prefill": _rates(counted["prefill_tokens"], counted["prefill_s"], prefill),
        "decode": _rates(counted["decode_tokens"], counted["decode_s"], decode),
        "update": _rates(
            sum(row.num_tokens for row in rows),
            wall["update"],
            UPDATE_TO_FORWARD * forward,
        ),
        "machine": machine(),
    }


def _medians(
    parts: Mapping[str, Callable[[], Any]],
    rollout: Callable[[], dict[str, float]],
    rounds: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the medians of the seconds of each part and of what a rollout counts, over `rounds`
    in which all take turns, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    counts: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        for name, part in parts.items():
            began = time.perf_counter()
            part()
            if has_gpu():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
        counts.append(rollout())
    return (
        {name: median(values[1:]) for name, values in seconds.items()},
        {name: median(count[name] for count in counts[1:]) for name in counts[0]},
    )


def _rollout(
    engine: VllmEngine, model: build.Model, requests: list[Request], response_tokens: int
) -> dict[str, float]:
    """Returns the engine's counts and the seconds that it took to load the weights."""
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=response_tokens, n=1)
    weights, version = model.collector.weights()
    began = time.perf_counter()
    with engine.awake(weights, version) as generate:
        loaded = time.perf_counter() - began
        for _ in generate(requests, sampling):
            pass
    return engine.take_counts() | {"sync_s": loaded}


def _rates(tokens: float, seconds: float, flops: float) -> dict[str, float]:
    return {
        "tokens": tokens,
        "s": seconds,
        "tokens_per_s": tokens / seconds,
        "flops_per_s": flops / seconds,
    }
