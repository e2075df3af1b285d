"""Prompts -> scored groups. Each engine samples and scores its share; every rank gets all groups.

awake: weights streamed into the engine
  prompts -> share of this engine -> requests -> completions, scored as they end
  groups of all engines, in the order of the prompts
asleep

With a budget of tokens, groups may come back with responses that go on in a later step (`rounds`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_qlrl.errors import DataError, RewardError, StopRequested
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.metrics.rollouts import custom_metrics, engine_metrics, judge_metrics
from megatron_qlrl.parallel.collectives import gather_objects, on_all_ranks
from megatron_qlrl.rollout.rounds import known_logprobs, next_task
from megatron_qlrl.rollout.seeds import share_prompts, token_seed
from megatron_qlrl.rollout.vllm_engine import Generate, Sampling, VllmEngine
from megatron_qlrl.types import Budget, ProbeAnswer, Prompt, Rollout, Score, ScoredGroup

# Scored groups of the prompts, in their order, the same on every rank.
Collect = Callable[[Sequence[Prompt]], list[ScoredGroup]]
NO_SCORE = Score(None, 0.0)
"""Stands for the score of a response that goes on."""


class Scorer(Protocol):
    """What `reward.score.Scorer` offers."""

    @property
    def last_failure(self) -> str: ...
    def score(self, prompt: Prompt, response: str) -> Future[Score]: ...
    def take_counts(self) -> dict[str, float]: ...
    def take_custom_counts(self) -> dict[str, float]: ...


class Probe(Protocol):
    """What `train.probe.WeightProbe` offers."""

    @property
    def prompt_ids(self) -> np.ndarray: ...
    @property
    def num_tokens(self) -> int: ...
    def check(self, answer: ProbeAnswer | None) -> dict[str, float]: ...


class Answers(Protocol):
    """Answers that are kept as they come, so that a run that was killed need not ask again."""

    def known(self, prompt: Prompt, sample: int) -> Rollout | None:
        """Returns the answer that is there already, the same on every rank."""
        ...

    def add(self, prompt: Prompt, rollout: Rollout) -> None:
        """Keeps an answer (on the leading rank of the engine that gave it).

        Raises:
            DataError: it cannot be kept.
        """
        ...


@dataclass(frozen=True)
class Collector:
    """What `collect_groups` needs beside the prompts. Methods are collective.

    Attributes:
        engine: this rank's engine, started at the first call: Megatron's part is made before it,
            which is the order that is tested.
        weights: the policy's present weights as a stream of Hugging Face tensors with the LM head
            by name, and their version.
        decode: token ids of a response -> text.
        scorer: the rewards.
        run_seed: part of every response's seed.
        max_masked_share: a batch stops the run when more of its responses have no verdict.
        probe: asked after each weight sync; None: the engines are trusted.
        warn: gets a line where own rewards failed.
    """

    engine: Callable[[], VllmEngine]
    weights: Callable[[], tuple[Iterable[tuple[str, torch.Tensor]], int]]
    decode: Callable[[Sequence[int]], str]
    scorer: Scorer
    run_seed: int
    max_masked_share: float
    probe: Probe | None = None
    warn: Callable[[str], None] = lambda _: None

    @contextmanager
    def session(
        self,
        sampling: Sampling,
        *,
        step: int,
        meter: Meter,
        answers: Answers | None = None,
        budget: Budget | None = None,
    ) -> Iterator[Collect]:
        """Yields `collect`. Its first call wakes the engine with the present weights; at the end
        the engine sleeps, and the meter gets what engine and judge did. What `answers` holds is not
        asked for again. Without a budget every group is whole."""
        with ExitStack() as stack:
            running: list[tuple[Generate, int]] = []

            def collect(prompts: Sequence[Prompt]) -> list[ScoredGroup]:
                if not running:
                    running.append(self._wake(stack, meter))
                return collect_groups(
                    self, prompts, *running[0], sampling, step, meter, answers, budget
                )

            yield collect
            if not running:
                return
            with meter.timed("update_weights"):
                stack.close()
            scorer = self.scorer
            mine = (
                (self.engine().take_counts(), meter.seconds("gen")),
                scorer.take_counts(),
                (scorer.take_custom_counts(), scorer.last_failure),
            )
            engines, judges, customs = zip(*gather_objects(mine), strict=True)
            counts, seconds = zip(*engines, strict=True)
            meter.update(engine_metrics(counts, gen_s=max(seconds)))
            meter.update(judge_metrics(judges))
            counts, reasons = zip(*customs, strict=True)
            own = custom_metrics(counts)
            meter.update(own)
            self._tell_failures(own, reasons)

    def _tell_failures(self, metrics: Mapping[str, float], reasons: Sequence[str]) -> None:
        """Warns of own rewards that failed."""
        names = ("raised", "invalid", "timeout", "crashed")
        failed = {n: c for n in names if (c := metrics.get(f"reward/custom/{n}", 0.0))}
        if failed:
            kinds = ", ".join(f"{name} {count:g}" for name, count in failed.items())
            self.warn(
                f"own rewards failed on {sum(failed.values()):g} of "
                f"{metrics['reward/custom/asked']:g} responses, which have no verdict ({kinds}); "
                f"the last reason: {next(filter(None, reasons))}"
            )

    def _wake(self, stack: ExitStack, meter: Meter) -> tuple[Generate, int]:
        """Wakes the engine until the stack ends; returns `generate` and the weights' version.

        Raises:
            SyncError: an engine did not get the trainer's weights (every rank).
        """
        with meter.timed("update_weights"):
            engine = self.engine()
            stream, version = self.weights()
            generate = on_all_ranks(lambda: stack.enter_context(engine.awake(stream, version)))
        if self.probe is not None:
            with meter.timed("probe"):
                answer = engine.probe(self.probe.prompt_ids, self.probe.num_tokens)
                meter.update(self.probe.check(answer if engine.leads else None))
        return generate, version


def collect_groups(
    collector: Collector,
    prompts: Sequence[Prompt],
    generate: Generate,
    version: int,
    sampling: Sampling,
    step: int,
    meter: Meter,
    answers: Answers | None = None,
    budget: Budget | None = None,
) -> list[ScoredGroup]:
    """The prompts' groups by engines that are awake (`generate`) with weights of `version`; those
    that `budget` has begun go on.

    Raises:
        DataError: an answer cannot be kept (every rank).
        RewardError: too many responses have no verdict.
        StopRequested: some engine was asked to stop (raised on every rank).
    """
    engine, scorer = collector.engine(), collector.scorer
    unwritten: DataError | None = None
    rollouts: dict[tuple[int, int], Rollout] = {}
    scores: dict[tuple[int, int], Future[Score]] = {}
    begun = budget.begun if budget is not None else {}
    stopped = ""
    with meter.timed("gen"):
        mine = share_prompts(prompts, engine.num_engines)[engine.engine_index]
        everything = [(index, sample) for index in mine for sample in range(sampling.n)]
        for index, sample in everything:
            prompt = prompts[index]
            rollout = answers.known(prompt, sample) if answers is not None else None
            if rollout is not None:
                rollouts[index, sample] = rollout
                if engine.leads:
                    scores[index, sample] = scorer.score(prompt, rollout.text)
            group = begun.get(prompt.uid)
            if group is not None and not group.rollouts[sample].goes_on:
                rollouts[index, sample] = group.rollouts[sample]
                scores[index, sample] = done(group.scores[sample])
        keys = [key for key in everything if key not in rollouts]
        tasks = [
            next_task(
                prompts[i],
                k,
                budget,
                max_tokens=sampling.max_tokens,
                seed=token_seed(collector.run_seed, step, prompts[i].uid, k),
            )
            for i, k in keys
        ]
        try:
            for number, completion in generate([task.request for task in tasks], sampling):
                index, sample = keys[number]
                rollout = rollouts[index, sample] = tasks[number].rollout(
                    completion, version=version, decode=collector.decode
                )
                if rollout.goes_on:
                    scores[index, sample] = done(NO_SCORE)
                elif engine.leads:
                    unwritten = unwritten or _recorded(answers, prompts[index], rollout)
                    scores[index, sample] = scorer.score(prompts[index], rollout.text)
        except StopRequested as request:
            stopped = str(request)
        # Every rank waits here for the engine with the longest responses.
        if reasons := [reason for reason in gather_objects(stopped) if reason]:
            raise StopRequested(reasons[0])

    def groups_of_this_engine() -> dict[int, ScoredGroup]:
        if not engine.leads:
            return {}
        if unwritten is not None:
            raise unwritten
        wait(scores.values())  # one awakening in place of one for each
        groups: dict[int, ScoredGroup] = {}
        for i in mine:
            sampled = tuple(rollouts[i, sample] for sample in range(sampling.n))
            verdicts = tuple(scores[i, sample].result() for sample in range(sampling.n))
            before = begun.get(prompts[i].uid)
            old = known_logprobs(before, sampled) if before is not None else None
            groups[i] = ScoredGroup(prompts[i], sampled, verdicts, old)
        return groups

    with meter.timed("reward"):
        parts = gather_objects((on_all_ranks(groups_of_this_engine), scorer.last_failure))
        by_index = {index: group for groups, _ in parts for index, group in groups.items()}
        groups = [by_index[i] for i in range(len(prompts))]
        failure = next((failure for _, failure in parts if failure), "")
        check_masked(groups, max_share=collector.max_masked_share, reason=failure)
    return groups


def check_masked(groups: Sequence[ScoredGroup], *, max_share: float, reason: str) -> None:
    """Stops a batch whose rewards are no longer those of the task.

    Raises:
        RewardError: more than `max_share` of the responses have no verdict; `reason` says why.
    """
    values = [s.value for g in groups for s in g.scores]
    waiting = sum(rollout.goes_on for group in groups for rollout in group.rollouts)
    masked, ended = values.count(None) - waiting, len(values) - waiting
    if masked > max_share * ended:
        raise RewardError(
            f"judge or own rewards gave no verdict on {masked} of {ended} responses, more than "
            f"reward.max_masked_share={max_share:g} ({reason}). Bring the judge back, or mend the "
            "function, and start again: the run resumes"
        )


def done(score: Score) -> Future[Score]:
    """Returns a score that nothing has to be waited for."""
    future: Future[Score] = Future()
    future.set_result(score)
    return future


def _recorded(answers: Answers | None, prompt: Prompt, rollout: Rollout) -> DataError | None:
    """Keeps an answer. An error is returned, because the other ranks of the engine go on."""
    try:
        if answers is not None:
            answers.add(prompt, rollout)
    except DataError as error:
        return error
    return None
