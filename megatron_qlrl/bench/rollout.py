"""Measures generation where the lengths of responses differ: as it is (plain), with the longest
responses first (sorted), and with a budget of tokens in a step (partial rollouts).

All sides have the same prompts, with responses of the same log-normal lengths, which are forced on
the engine. Tokens per second are those of batches: every token that a side samples is in one of its
batches. Sorted is a bound on what order alone can do, because no run knows its lengths before.
Weights are synchronised before each step, but no update is made.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from megatron_qlrl import build
from megatron_qlrl.bench.measure import machine
from megatron_qlrl.config.checks import check_layout
from megatron_qlrl.config.schema import Config, CurriculumConfig
from megatron_qlrl.config.shape import read_shape
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.curriculum.sampler import Sampler
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.parallel.collectives import gather_objects
from megatron_qlrl.parallel.context import process_group
from megatron_qlrl.platform.device import has_gpu
from megatron_qlrl.platform.env import init_ranks
from megatron_qlrl.rollout.collect import Collector, done
from megatron_qlrl.rollout.seeds import token_seed
from megatron_qlrl.rollout.vllm_engine import Completion, Generate, Request, Sampling, VllmEngine
from megatron_qlrl.types import Prompt, Score, ScoredGroup

Side = Literal["plain", "sorted", "partial"]
SIDES: tuple[Side, ...] = ("plain", "sorted", "partial")


@dataclass(frozen=True)
class Work:
    """What all sides have to do: steps of as many prompts, all of the same length."""

    steps: int
    prompts: Sequence[Prompt]
    lengths: Mapping[tuple[str, int], int]
    """The length of each response, by uid and sample."""

    def longest(self, prompt: Prompt) -> int:
        return max(n for (uid, _), n in self.lengths.items() if uid == prompt.uid)


@dataclass
class Spent:
    """What a side took. A call is one round of one step."""

    calls: list[float] = field(default_factory=list[float])
    """Seconds of this engine in each call."""
    busy: list[float] = field(default_factory=list[float])
    """Their sum over the call's responses until each of them ended."""
    responses: list[int] = field(default_factory=list[int])
    prompt_tokens_read: float = 0.0
    tokens: int = 0
    staleness: float = 0.0


class ForcedEngine:
    """An engine whose responses end where `Work.lengths` says, whatever they say."""

    def __init__(self, engine: VllmEngine, work: Work, *, group_size: int) -> None:
        self._engine, self._work, self._group_size = engine, work, group_size
        self.num_engines, self.engine_index = engine.num_engines, engine.engine_index
        self.leads = engine.leads
        self.spent = Spent()
        self._identities: dict[int, tuple[str, int]] = {}

    def begin(self, step: int, *, run_seed: int) -> None:
        """Learns which response each seed of the step belongs to."""
        self._identities = {
            token_seed(run_seed, step, prompt.uid, k): (prompt.uid, k)
            for prompt in self._work.prompts
            for k in range(self._group_size)
        }

    @contextmanager
    def awake(
        self, weights: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> Iterator[Generate]:
        with self._engine.awake(weights, version) as generate:
            self._generate = generate
            yield self._forced

    def take_counts(self) -> dict[str, float]:
        counts = self._engine.take_counts()
        self.spent.prompt_tokens_read += counts.get("prefill_tokens", 0.0)
        return counts

    def _forced(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        left = [self._left(request) for request in requests]
        forced = [
            replace(request, max_tokens=min(n, request.max_tokens or n))
            for request, n in zip(requests, left, strict=True)
        ]
        began, busy = clock(), 0.0
        for number, completion in self._generate(forced, replace(sampling, ignore_end=True)):
            busy += clock() - began
            yield number, replace(completion, finished=len(completion.token_ids) == left[number])
        self.spent.calls.append(clock() - began)
        self.spent.busy.append(busy)
        self.spent.responses.append(len(requests))

    def _left(self, request: Request) -> int:
        so_far = len(request.prompt_ids) - self._work.prompts[0].num_tokens
        return self._work.lengths[self._identities[request.seed]] - so_far


def clock() -> float:
    """Returns seconds by the clock on a GPU. On a CPU, those of this process alone, because the
    clock measures other processes, too."""
    return time.perf_counter() if has_gpu() else time.process_time()


class NoScorer:
    """Rewards take no time here."""

    last_failure = ""

    def score(self, prompt: Prompt, response: str) -> Future[Score]:
        return done(Score(0.0, 0.0))

    def take_counts(self) -> dict[str, float]:
        return {}

    def take_custom_counts(self) -> dict[str, float]:
        return {}


def bench_rollout(
    config: Config,
    *,
    steps: int,
    prompt_tokens: int,
    median_tokens: float,
    sigma: float,
    rounds: int,
) -> dict[str, Any]:
    """Returns tokens per second and idle shares of each side, the same on every rank: medians over
    rounds in which the sides take turns, after a step that warms up. The config gives model, groups
    and the budget of the partial side.

    Raises:
        ConfigError: the config has no budget, or takes no sequences of this length.
    """
    ranks = init_ranks()
    check_rollout(config, prompt_tokens=prompt_tokens, world_size=ranks.world_size)
    with process_group(rank=ranks.rank, local_rank=ranks.local_rank, world_size=ranks.world_size):
        job = build.make_job(config)
        work = make_work(
            config, steps=steps, prompt_tokens=prompt_tokens, median_tokens=median_tokens,
            sigma=sigma, vocab=job.shape.vocab_size,
        )  # fmt: skip
        with build.open_model(job, build.make_scorer(job), temperature=1.0) as model:
            run_side(config, model.collector, "plain", replace(work, steps=1))
            spent: dict[Side, list[dict[str, float]]] = {side: [] for side in SIDES}
            for _ in range(rounds):
                for side in SIDES:
                    spent[side].append(run_side(config, model.collector, side, work))
    figures = {
        side: {name: median(one[name] for one in results) for name in results[0]}
        for side, results in spent.items()
    }
    rates = {side: values["tokens_per_s"] for side, values in figures.items()}
    return {
        "bench": "rollout",
        "engines": ranks.world_size // config.rollout.tp,
        "steps": steps,
        "prompts_per_step": config.rollout.prompts_per_step,
        "group_size": config.rollout.group_size,
        "prompt_tokens": prompt_tokens,
        "median_tokens": median_tokens,
        "sigma": sigma,
        "max_response_tokens": config.rollout.max_response_tokens,
        "tokens_per_round": config.rollout.tokens_per_round,
        "max_staleness": config.algorithm.max_staleness,
        "clock": "wall" if has_gpu() else "CPU seconds of each engine's process",
        "sides": figures,
        "speedup": {side: rates[side] / rates["plain"] for side in SIDES},
        "machine": machine(),
    }


def check_rollout(config: Config, *, prompt_tokens: int, world_size: int) -> None:
    """
    Raises:
        ConfigError: see `bench_rollout`.
    """
    shape = read_shape(config.model.path, rope_scaling=config.model.rope_scaling)
    check_layout(config, shape, world_size=world_size)
    if config.rollout.tokens_per_round is None:
        raise ConfigError(
            "`qlrl bench rollout` needs a budget for its partial side: set "
            "rollout.tokens_per_round and algorithm.max_staleness"
        )
    longest = min(config.longest_generation, shape.max_positions)
    if prompt_tokens + config.rollout.max_response_tokens > longest:
        raise ConfigError(
            f"--prompt-tokens {prompt_tokens} and rollout.max_response_tokens="
            f"{config.rollout.max_response_tokens} are more than the {longest} tokens that a "
            "sequence of this config can have; give fewer"
        )


def make_work(
    config: Config,
    *,
    steps: int,
    prompt_tokens: int,
    median_tokens: float,
    sigma: float,
    vocab: int,
) -> Work:
    """Random prompts, and log-normal lengths that rollout.max_response_tokens cuts."""
    rng = np.random.default_rng(config.run.seed)
    prompts = [
        Prompt(f"bench:{n}", rng.integers(0, vocab, prompt_tokens).astype(np.int32), "", "", "")
        for n in range(steps * config.rollout.prompts_per_step)
    ]
    limit, size = config.rollout.max_response_tokens, config.rollout.group_size
    drawn = median_tokens * np.exp(sigma * rng.standard_normal((len(prompts), size)))
    tokens = np.clip(np.round(drawn), 1, limit).astype(int).tolist()
    lengths = {(p.uid, k): tokens[n][k] for n, p in enumerate(prompts) for k in range(size)}
    return Work(steps, prompts, lengths)


def run_side(config: Config, collector: Collector, side: Side, work: Work) -> dict[str, float]:
    """Runs all steps of one side; the result is the same on every rank."""
    engine = ForcedEngine(collector.engine(), work, group_size=config.rollout.group_size)
    collector = replace(
        collector,
        engine=lambda: engine,  # pyright: ignore[reportArgumentType]
        scorer=NoScorer(),
        probe=None,
    )
    sampler = Sampler(
        Curriculum(
            work.prompts,
            limits=[work.prompts[0].num_tokens],
            seed=config.run.seed,
            config=CurriculumConfig.model_validate({}),
        ),
        config=config.algorithm,
        prompts_per_step=config.rollout.prompts_per_step,
        carried_share=0.0,
        keep=lambda rewards: True,
        warn=lambda message: None,
        tokens_per_round=config.rollout.tokens_per_round if side == "partial" else None,
    )
    size, limit = config.rollout.group_size, config.rollout.max_response_tokens
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=limit, n=size)
    for step in range(work.steps):
        engine.begin(step, run_seed=collector.run_seed)
        # As if there were one update a step.
        sampler.begin(0, step, version=step, last=step == work.steps - 1)
        stream, _ = collector.weights()
        present = replace(collector, weights=lambda s=stream, v=step: (s, v))
        with present.session(sampling, step=step, meter=Meter(), budget=sampler.budget) as collect:
            while prompts := sampler.draw():
                if side == "sorted":
                    prompts = sorted(prompts, key=work.longest, reverse=True)
                sampler.observe(collect(prompts))
        batch = sampler.take()
        engine.spent.tokens += sum(len(r.token_ids) for g in batch.groups for r in g.rollouts)
        engine.spent.staleness = max(engine.spent.staleness, batch.metrics["batch/staleness/max"])
        sampler.hold([_with_logprobs(group) for group in batch.waiting])
    return summarise(gather_objects(engine.spent))


def summarise(engines: Sequence[Spent]) -> dict[str, float]:
    """Speed and idle shares of a side from what each engine has spent. Every call lasts as long as
    its slowest engine."""
    slowest = [max(times) for times in zip(*(e.calls for e in engines), strict=True)]
    slots = sum(n * t for e in engines for n, t in zip(e.responses, slowest, strict=True))
    return {
        "tokens": float(engines[0].tokens),
        "seconds": sum(slowest),
        "tokens_per_s": engines[0].tokens / sum(slowest),
        "idle_share": 1 - sum(sum(e.busy) for e in engines) / slots,
        "engine_idle_share": 1 - sum(sum(e.calls) for e in engines) / len(engines) / sum(slowest),
        "prompt_tokens_read": sum(e.prompt_tokens_read for e in engines),
        "staleness_max": engines[0].staleness,
    }


def _with_logprobs(group: ScoredGroup) -> ScoredGroup:
    """As if the trainer had given them."""
    zeros = tuple(np.zeros(len(r.token_ids), np.float32) for r in group.rollouts)
    return replace(group, old_logprobs=zeros)
