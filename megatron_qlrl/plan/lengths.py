"""Simulates generation with responses of different lengths, dealt to the engines as a run does.

lengths (a run's own, or log-normal) -> the sampler's prompts -> shares of the engines -> seconds

Three sides sample responses of the same lengths: plain, sorted (the longest first, a bound on what
order can do, because no run knows its lengths before) and partial (`rollout.tokens_per_round`). The
curriculum's own sampler decides what a step draws and what waits. The same arguments give the same
figures. Every prompt has one length, no group is filtered out, an engine reads all prompts of a
round before it samples, and a response that ends makes room for the next one at once.
"""

import heapq
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_qlrl.config.schema import AlgorithmConfig, CurriculumConfig, RolloutConfig
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.curriculum.sampler import Sampler
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.plan.estimate import Engine
from megatron_qlrl.plan.phase import PhasePlan
from megatron_qlrl.rollout.seeds import share_prompts
from megatron_qlrl.types import Budget, Prompt, Rollout, Score, ScoredGroup

Side = Literal["plain", "sorted", "partial"]
SIDES: tuple[Side, ...] = ("plain", "sorted", "partial")
COUNTED_STEPS = 16
SEED = 0

Draw = Callable[[np.random.Generator, int], np.ndarray]
"""Draws the lengths of the responses to one prompt."""

Task = tuple[int, int]
"""A response in a round: the tokens that it has, and those that are sampled now."""


@dataclass(frozen=True)
class Ran:
    """What one engine did in a round.

    Attributes:
        read_s, decode_s: seconds to read prompts and begun responses, and to sample.
        steps: steps of the engine, each of which gives every running response a token.
        tokens: tokens that it sampled.
        width: the most responses that ran at one time.
    """

    read_s: float
    decode_s: float
    steps: int
    tokens: int
    width: int

    @property
    def seconds(self) -> float:
        return self.read_s + self.decode_s


@dataclass(frozen=True)
class Generation:
    """The generation of one side, in means over the counted steps.

    Attributes:
        read_s, decode_s: seconds of a step, with every round as long as its slowest engine's.
        tokens: tokens that a step samples.
        rounds: rounds of a step.
        engines_idle: share of the engines' time in which they wait for the slowest one.
        slots_idle: share of token slots that stay empty: each step of the slowest engine has one
            for each response that an engine runs at most.
        stale_share: share of the trained tokens that are from weights of earlier steps.
    """

    read_s: float
    decode_s: float
    tokens: float
    rounds: float
    engines_idle: float
    slots_idle: float
    stale_share: float

    @property
    def seconds(self) -> float:
        return self.read_s + self.decode_s


@dataclass(frozen=True)
class Simulation:
    """A phase's generation.

    Attributes:
        at_mean_s: seconds by the plan's estimate, with all responses of the mean length.
        engines, responses, slots: the number of engines; for each, its share of a step's responses
            and how many run at one time.
        tokens_per_round, max_staleness: settings of the partial side: the config's, or what the
            simulation assumes where the config has no budget.
    """

    at_mean_s: float
    engines: int
    responses: float
    slots: int
    tokens_per_round: int
    max_staleness: int
    sides: Mapping[Side, Generation]


def read_lengths(spec: str) -> Draw:
    """Returns the distribution that `--lengths` names.

    Raises:
        ConfigError: it is neither `lognormal[:MEDIAN,SIGMA]` nor a run's rollout log.
    """
    if spec == "lognormal":
        return lognormal(2000, 1)
    number = r"(\d+(?:\.\d+)?)"
    if given := re.fullmatch(f"lognormal:{number},{number}", spec):
        return lognormal(float(given[1]), float(given[2]))
    path = Path(spec)
    files = sorted(path.glob("rollouts/step_*.jsonl")) if path.is_dir() else [path]
    groups = [group for file in files if file.is_file() for group in _read_groups(file)]
    if not groups:
        raise ConfigError(
            f"--lengths {spec} is neither lognormal, nor lognormal:MEDIAN,SIGMA (as in "
            "lognormal:2000,1), nor a run folder or one of its files rollouts/step_*.jsonl that "
            "holds responses"
        )
    return logged(groups)


def lognormal(median: float, sigma: float) -> Draw:
    """Returns lengths whose logarithms are normally distributed, independent of the prompt."""
    return lambda rng, n: np.round(median * np.exp(sigma * rng.standard_normal(n)))


def logged(groups: Sequence[Sequence[int]]) -> Draw:
    """Returns the lengths of a log: each prompt stands for one of the log's, and its responses take
    their lengths from that one's, with replacement."""
    return lambda rng, n: rng.choice(groups[int(rng.integers(len(groups)))], n)


def _read_groups(file: Path) -> list[list[int]]:
    """Returns the lengths in a rollout log by prompt. A line that is only half written is left
    out."""
    groups: dict[str, list[int]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            groups.setdefault(record["uid"], []).append(int(record["num_tokens"]))
        except (ValueError, KeyError, TypeError):
            continue
    return list(groups.values())


def mean_tokens(draw: Draw, limit: int) -> int:
    """Returns the mean length of responses that `limit` cuts."""
    rng = np.random.default_rng(SEED)
    return round(float(np.mean([np.clip(draw(rng, 16), 1, limit) for _ in range(4096)])))


def run_engine(engine: Engine, groups: Sequence[tuple[int, Sequence[Task]]]) -> Ran:
    """Returns what an engine does for its groups (a prompt's tokens and its responses), in their
    order: as many responses as it has slots for run at once, and one that ends makes room."""
    slots = int(engine.slots)
    waiting = [(prompt + begun, new) for prompt, tasks in groups for begun, new in tasks][::-1]
    width, tokens = min(slots, len(waiting)), sum(new for _, new in waiting)
    running: list[tuple[int, int]] = []  # the step at which a response ends, its context by then
    step, context, decode_s = 0, 0, 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            before, new = waiting.pop()
            heapq.heappush(running, (step + new, before + new))
            context += before
        end, count = running[0][0], len(running)
        steps = end - step
        # Each running response grows by a token in each step.
        tokens_read = steps * context + count * steps * (steps - 1) / 2
        decode_s += steps * engine.step_s + tokens_read * engine.token_s
        step, context = end, context + steps * count
        while running and running[0][0] == end:
            context -= heapq.heappop(running)[1]
    read_s = sum(engine.read_s(prompt, [begun for begun, _ in tasks]) for prompt, tasks in groups)
    return Ran(read_s, decode_s, step, tokens, width)


def run_round(
    engine: Engine, num_engines: int, prompts: Sequence[Prompt], tasks: Sequence[Sequence[Task]]
) -> list[Ran]:
    """Returns what each engine does in a round, with its share as in `rollout/collect.py`."""
    return [
        run_engine(engine, [(prompts[i].num_tokens, tasks[i]) for i in share])
        for share in share_prompts(prompts, num_engines)
    ]


def simulate_phase(plan: PhasePlan, draw: Draw, *, gpus: int) -> Simulation:
    """Returns the generation of a phase that is planned for the mean length of `draw`."""
    assert plan.engine is not None
    config, engine = plan.config, plan.engine
    rollout, algorithm = config.rollout, config.algorithm
    budget, staleness = rollout.tokens_per_round, algorithm.max_staleness
    if budget is None:  # every response ends within four steps
        budget = ceil(rollout.max_response_tokens / 4)
        staleness = max(staleness, 4 * algorithm.updates_per_step)
    engines = gpus // rollout.tp
    # What waits has its usual size when the longest responses have ended twice.
    warm_up = 2 * ceil(rollout.max_response_tokens / budget)
    with_staleness = algorithm.model_copy(update={"max_staleness": staleness})
    sides: dict[Side, Generation] = {
        side: simulate(
            side, draw, engine=engine, num_engines=engines, prompt_tokens=plan.lengths.prompt,
            rollout=rollout, algorithm=with_staleness if side == "partial" else algorithm,
            tokens_per_round=budget if side == "partial" else None, warm_up=warm_up,
        )
        for side in SIDES
    }  # fmt: skip
    return Simulation(
        at_mean_s=plan.seconds["prompts"] + plan.seconds["generation"],
        engines=engines,
        responses=rollout.prompts_per_step * rollout.group_size / engines,
        slots=int(engine.slots),
        tokens_per_round=budget,
        max_staleness=staleness,
        sides=sides,
    )


def with_lengths(plan: PhasePlan, simulation: Simulation) -> PhasePlan:
    """Returns the plan with the seconds of the side that its config names."""
    side = simulation.sides["partial" if plan.config.rollout.tokens_per_round else "plain"]
    return replace(
        plan, seconds={**plan.seconds, "prompts": side.read_s, "generation": side.decode_s}
    )


def simulate(
    side: Side,
    draw: Draw,
    *,
    engine: Engine,
    num_engines: int,
    prompt_tokens: int,
    rollout: RolloutConfig,
    algorithm: AlgorithmConfig,
    tokens_per_round: int | None,
    warm_up: int,
) -> Generation:
    """Returns the generation of one side, without the steps of the warm-up."""
    steps = warm_up + COUNTED_STEPS
    # As many prompts as the sampler may ask for, so that none comes twice.
    each = ceil(rollout.prompts_per_step * algorithm.oversampling) * algorithm.generation_rounds
    token_ids = np.zeros(prompt_tokens, np.int32)
    prompts = [Prompt(str(n), token_ids, "", "", "") for n in range(steps * each)]
    rng, limit = np.random.default_rng(SEED), rollout.max_response_tokens
    lengths: dict[str, list[int]] = {
        prompt.uid: np.clip(draw(rng, rollout.group_size), 1, limit).astype(int).tolist()
        for prompt in prompts
    }
    sampler = Sampler(
        Curriculum(
            prompts, limits=[prompt_tokens], seed=SEED, config=CurriculumConfig.model_validate({})
        ),
        config=algorithm,
        prompts_per_step=rollout.prompts_per_step,
        carried_share=0.0,
        keep=lambda rewards: True,
        warn=lambda message: None,
        tokens_per_round=tokens_per_round,
    )
    rounds: list[list[Ran]] = []
    stale: list[float] = []
    for step in range(steps):
        version = step * algorithm.updates_per_step
        sampler.begin(0, step, version=version)
        while drawn := sampler.draw():
            if side == "sorted":
                drawn = sorted(drawn, key=lambda prompt: -max(lengths[prompt.uid]))
            results = [_go_on(p, lengths[p.uid], sampler.budget, version) for p in drawn]
            if step >= warm_up:
                rounds.append(
                    run_round(engine, num_engines, drawn, [tasks for _, tasks in results])
                )
            sampler.observe([group for group, _ in results])
        batch = sampler.take()
        stale.append(batch.metrics.get("batch/stale_token_share", 0.0))
        # The sampler asks for log-probs, and does not read them.
        sampler.hold([replace(group, old_logprobs=()) for group in batch.waiting])
    share = float(np.mean(stale[warm_up:]))
    return summarise(rounds, steps=COUNTED_STEPS, stale_share=share)


def summarise(rounds: Sequence[Sequence[Ran]], *, steps: int, stale_share: float) -> Generation:
    """Returns the means of a step over the rounds of `steps` steps."""
    slowest = [max(engines, key=lambda ran: ran.seconds) for engines in rounds]
    tokens = sum(ran.tokens for engines in rounds for ran in engines)
    slots = sum(max(r.steps for r in engines) * sum(r.width for r in engines) for engines in rounds)
    busy_s = sum(ran.seconds for engines in rounds for ran in engines) / len(rounds[0])
    return Generation(
        read_s=sum(ran.read_s for ran in slowest) / steps,
        decode_s=sum(ran.decode_s for ran in slowest) / steps,
        tokens=tokens / steps,
        rounds=len(rounds) / steps,
        engines_idle=1 - busy_s / sum(ran.seconds for ran in slowest),
        slots_idle=1 - tokens / slots,
        stale_share=stale_share,
    )


def _go_on(
    prompt: Prompt, lengths: Sequence[int], budget: Budget | None, version: int
) -> tuple[ScoredGroup, list[Task]]:
    """Returns a prompt's group as a round leaves it, and what the round samples of it."""
    begun = budget.begun.get(prompt.uid) if budget is not None else None
    most = budget.tokens_of(prompt.uid) if budget is not None else None
    rollouts: list[Rollout] = []
    tasks: list[Task] = []
    for sample, length in enumerate(lengths):
        versions = np.zeros(0, np.int32) if begun is None else begun.rollouts[sample].token_versions
        has = len(versions)
        new = min(length - has, most or length)
        if new:
            tasks.append((has, new))
            versions = np.append(versions, np.full(new, version, np.int32))
        rollouts.append(
            Rollout(
                prompt_uid=prompt.uid,
                sample=sample,
                token_ids=versions,
                engine_logprobs=versions,
                text="",
                finished=True,
                weight_version=int(versions[0]),
                versions=versions,
                goes_on=has + new < length,
            )
        )
    return ScoredGroup(prompt, tuple(rollouts), (Score(0.0, 0.0),) * len(rollouts)), tasks
