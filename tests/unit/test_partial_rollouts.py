"""Responses that go on over several steps: the real sampler, collector, trainer and loop, with an
engine whose tokens say what was asked of it."""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from fake_policy import FakePolicy, make_trainer

from megatron_qlrl.advantage.apply import with_advantages
from megatron_qlrl.config.schema import AlgorithmConfig, CurriculumConfig
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.curriculum.sampler import Sampler
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.rl import RLParts, train_rl
from megatron_qlrl.rollout.collect import Collector
from megatron_qlrl.rollout.seeds import token_seed
from megatron_qlrl.rollout.vllm_engine import COUNTS, Completion, Request, Sampling
from megatron_qlrl.train.phases import Phase
from megatron_qlrl.types import Prompt, Score, ScoredGroup, TrainGroup

pytestmark = pytest.mark.usefixtures("lone_group")

PROMPT_TOKENS = 3
PROMPTS = [Prompt(f"f:{i}", np.full(PROMPT_TOKENS, i, np.int32), "s", "?", "!") for i in range(12)]
MAX_TOKENS = 6


def length(prompt: int, sample: int) -> int:
    """Most responses have one or two tokens; those of prompt 1 have 1 and 5, those of prompt 2 have
    9 (which is cut at 6) and 1, those of prompt 3 have 3 and 3."""
    own = {1: (1, 5), 2: (9, 1), 3: (3, 3)}
    return own.get(prompt, (1, 2))[sample]


class FakeEngine:
    """Token j of a response is j, its log-prob -j - version / 10. It ends by itself when it is as
    long as `length` says."""

    num_engines, engine_index, leads = 1, 0, True

    def __init__(self, policy: FakePolicy) -> None:
        self.policy = policy
        self.step = 0
        self.asked: list[list[tuple[int, int, int, int]]] = []
        """Of each call, for each request: prompt, sample, tokens so far, the most tokens."""

    @contextmanager
    def awake(self, weights: Iterable[Any], version: int) -> Iterator[Any]:
        yield self.generate

    def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        seeds = {
            token_seed(5, self.step, prompt.uid, k): k
            for prompt in PROMPTS
            for k in range(sampling.n)
        }
        call: list[tuple[int, int, int, int]] = []
        self.asked.append(call)
        for number, request in enumerate(requests):
            prompt, sample = int(request.prompt_ids[0]), seeds[request.seed]
            so_far = len(request.prompt_ids) - PROMPT_TOKENS
            assert request.prompt_ids[PROMPT_TOKENS:].tolist() == list(range(so_far))
            assert request.max_tokens is not None
            call.append((prompt, sample, so_far, request.max_tokens))
            end = min(length(prompt, sample), so_far + request.max_tokens)
            ids = np.arange(so_far, end, dtype=np.int32)
            logprobs = (-ids - self.policy.version / 10).astype(np.float32)
            yield number, Completion(ids, logprobs, end == length(prompt, sample))

    def take_counts(self) -> dict[str, float]:
        return dict.fromkeys(COUNTS, 0.0)


class FakeScorer:
    """Pays for responses with an even number of tokens."""

    last_failure = ""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def score(self, prompt: Prompt, response: str) -> Future[Score]:
        self.asked.append((prompt.uid, response))
        value = float(response.count(".") % 2)
        done: Future[Score] = Future()
        done.set_result(Score(value, value))
        return done

    def take_counts(self) -> dict[str, float]:
        return {}

    def take_custom_counts(self) -> dict[str, float]:
        return {}


class Job:
    """A run of one phase; it is the recorder and what decides."""

    def __init__(
        self,
        *,
        tokens_per_round: int | None,
        prompts_per_step: int = 4,
        steps: int = 4,
        keep: Any = lambda rewards: True,
        **algorithm: Any,
    ) -> None:
        self.policy, self.scorer = FakePolicy(), FakeScorer()
        self.engine = FakeEngine(self.policy)
        self.num_steps = steps
        self.records: list[tuple[dict[str, float], list[ScoredGroup]]] = []
        self.states: list[str] = []
        self.versions: list[int] = []
        self.batches: list[list[ScoredGroup]] = []
        self.sampler = Sampler(
            Curriculum(PROMPTS, limits=[4], seed=0, config=CurriculumConfig.model_validate({})),
            config=AlgorithmConfig.model_validate(algorithm),
            prompts_per_step=prompts_per_step,
            carried_share=0.0,
            keep=keep,
            warn=lambda message: None,
            tokens_per_round=tokens_per_round,
        )

    def record(
        self,
        step: int,
        meter: Meter,
        groups: list[ScoredGroup],
        *,
        num_tokens: int,
        trainer: Any,
        data: Any,
    ) -> None:
        metrics = meter.summary()
        timed = ("timing_s/", "perf/")
        self.records.append(({k: v for k, v in metrics.items() if not k.startswith(timed)}, groups))
        self.states.append(json.dumps(data.state_dict()))
        self.versions.append(self.policy.version)

    def steps(self, phases: Sequence[Phase], first_step: int) -> Iterator[tuple[Phase, int]]:
        for step in range(first_step, phases[0].end_step):
            self.engine.step = step
            yield phases[0], step

    def decide(self, phase: Phase, step: int) -> None: ...

    def begin(self, step: int, phase: int, metrics: Any) -> None:
        """As the monitor does it."""

    @property
    def recorder(self) -> "Job":
        return self

    @property
    def monitor(self) -> "Job":
        return self

    def advantages(self, groups: Sequence[ScoredGroup]) -> list[TrainGroup]:
        self.batches.append(list(groups))
        return with_advantages(
            groups,
            kind="dr_grpo",
            deviation="group",
            task_of=lambda prompt: prompt.data_source,
            max_tokens=MAX_TOKENS,
            buffer_tokens=None,
        )

    def train(self, first_step: int = 0) -> "Job":
        same: Any = self
        collector = Collector(
            engine=lambda: self.engine,  # pyright: ignore[reportArgumentType]
            weights=lambda: (iter([]), self.policy.version),
            decode=lambda ids: ".".join(map(str, ids)),
            scorer=self.scorer,
            run_seed=5,
            max_masked_share=0.0,
        )
        parts = RLParts(
            run=same,
            sampler=self.sampler,
            collector=collector,
            sampling=Sampling(1.0, 1.0, MAX_TOKENS, 2),
            advantages=self.advantages,
            trainer=make_trainer(self.policy),
        )
        train_rl(parts, [Phase(0, "p", 0, self.num_steps)], first_step=first_step)
        return self

    def asked_of(self, prompt: int) -> list[list[tuple[int, int, int]]]:
        """Of each step, the requests for a prompt: sample, tokens so far, the most tokens."""
        return [
            [request[1:] for request in call if request[0] == prompt] for call in self.engine.asked
        ]

    def trained(self, prompt: int) -> list[tuple[int, ScoredGroup]]:
        """The steps and groups in which a prompt was trained on."""
        return [
            (step, group)
            for step, groups in enumerate(self.batches)
            for group in groups
            if group.prompt.uid == f"f:{prompt}"
        ]


def job(tokens_per_round: int | None, *, steps: int = 3, **settings: Any) -> Job:
    """All 12 prompts begin in the first step."""
    defaults: dict[str, Any] = {"prompts_per_step": 12, "max_staleness": 4}
    return Job(tokens_per_round=tokens_per_round, steps=steps, **defaults | settings)


def test_a_group_over_three_rounds() -> None:
    """With two tokens a step, the responses of prompt 1 are whole after 1 and 3 steps."""
    done = job(2, steps=4).train()
    assert done.asked_of(1)[:3] == [[(0, 0, 2), (1, 0, 2)], [(1, 2, 2)], [(1, 4, 2)]]
    ((step, group), *_) = done.trained(1)
    assert step == 2
    short, long = group.rollouts
    assert (short.token_ids.tolist(), short.token_versions.tolist()) == ([0], [0])
    assert (long.token_ids.tolist(), long.token_versions.tolist()) == (
        [0, 1, 2, 3, 4],
        [0, 0, 1, 1, 2],
    )
    assert long.engine_logprobs == pytest.approx([0, -1, -2.1, -3.1, -4.2])
    assert (long.finished, long.text, long.weight_version) == (True, "0.1.2.3.4", 0)
    assert group.whole and group.rewards.tolist() == [0.0, 0.0]
    # the trainer's log-probs: -version - 1, and NaN for what the present weights sampled
    assert group.old_logprobs is not None
    assert [old.tolist() for old in group.old_logprobs][0] == [-1.0]
    assert group.old_logprobs[1][:4].tolist() == [-1.0, -1.0, -2.0, -2.0]
    assert np.isnan(group.old_logprobs[1][4])
    row, number = done.policy.trained[2], [g.prompt.uid for g in done.batches[2]].index("f:1")
    (place,) = [place for index, k, place in row.slices() if (index, k) == (number, 1)]
    old = row.columns["old_logprobs"][place]
    assert old[:4].tolist() == [-1.0, -1.0, -2.0, -2.0]
    assert np.isnan(old[4])  # the loss takes that of the update's own forward pass


def test_a_response_is_scored_once_when_it_ends() -> None:
    done = job(2).train()
    asked = [text for uid, text in done.scorer.asked if uid == "f:1"]
    assert asked == ["0", "0.1.2.3.4"]


def test_a_response_is_cut_at_its_limit_over_all_rounds() -> None:
    done = job(4).train()
    assert done.asked_of(2)[:2] == [[(0, 0, 4), (1, 0, 4)], [(0, 4, 2)]]
    (step, group), *_ = done.trained(2)
    assert step == 1
    assert len(group.rollouts[0].token_ids) == MAX_TOKENS
    assert not group.rollouts[0].finished and not group.rollouts[0].goes_on


def test_groups_that_wait_are_drawn_first_and_no_second_time() -> None:
    """Three of the 12 prompts wait: the next step draws the other nine again."""
    done = job(2).train()
    prompts = [request[0] for request in done.engine.asked[1]]
    assert sorted(prompts[:4]) == [1, 2, 3, 3]
    assert sorted(set(prompts[4:])) == [0, *range(4, 12)]
    metrics, generated = done.records[0]
    assert len(generated) == 9
    assert metrics["batch/kept_groups"] == metrics["batch/groups"] == 9
    assert metrics["batch/unfinished_groups"] == 3
    assert metrics["batch/unfinished_responses"] == 4
    assert metrics["batch/unfinished_tokens"] == 8
    metrics, generated = done.records[1]
    assert metrics["batch/begun_groups"] == 3
    # Prompt 3 is whole now: four of its six tokens are of the weights before. The others have 27.
    assert len(generated) == 10
    assert metrics["batch/staleness/max"] == 1
    assert metrics["batch/staleness/mean"] == 0.1
    assert metrics["batch/staleness/token_mean"] == metrics["batch/stale_token_share"] == 4 / 33


def test_no_token_gets_older_than_the_limit() -> None:
    """With two tokens a step prompt 1 needs three steps; at one update it must end."""
    done = job(2, max_staleness=1).train()
    assert done.asked_of(1)[:2] == [[(0, 0, 2), (1, 0, 2)], [(1, 2, 4)]]
    assert done.records[1][0]["batch/due_groups"] == 3
    assert max(metrics["batch/staleness/max"] for metrics, _ in done.records) == 1
    assert all(metrics["batch/expired_groups"] == 0 for metrics, _ in done.records)


def test_every_response_ends_in_the_last_step_and_nothing_is_lost() -> None:
    """Of 4 prompts a step with one token each, one is whole in its first step at most."""
    done = job(1, steps=2, prompts_per_step=4).train()
    first, last = (metrics for metrics, _ in done.records)
    assert first["batch/unfinished_groups"] == 4
    # What waited is as many as the batch needs: nothing new begins.
    assert last["batch/kept_groups"] == 4
    assert last["batch/unfinished_groups"] == last["batch/dropped_groups"] == 0
    assert json.loads(done.states[-1])["waiting"] == []


def test_the_last_batch_takes_all_that_waited() -> None:
    done = job(1, steps=3, prompts_per_step=4).train()
    sizes = [metrics["batch/kept_groups"] for metrics, _ in done.records]
    assert sum(sizes) == 8
    assert done.records[-1][0]["batch/dropped_groups"] == 0


@pytest.mark.parametrize("settings", [{}, {"oversampling": 1.5, "prompts_per_step": 4}])
def test_a_budget_that_no_response_reaches_changes_nothing(settings: dict[str, Any]) -> None:
    plain, budget = job(None, **settings).train(), job(MAX_TOKENS, **settings).train()
    for (want, _), (got, _) in zip(plain.records, budget.records, strict=True):
        extra = got.keys() - want.keys()
        assert {name for name in extra if got[name]} <= {
            "batch/staleness/token_mean", "batch/stale_token_share",
        }  # fmt: skip
        assert {name: got[name] for name in want} == want
    assert plain.states == budget.states
    assert plain.scorer.asked == budget.scorer.asked
    for want, got in zip(plain.policy.trained, budget.policy.trained, strict=True):
        assert want.blocks == got.blocks
        assert want.token_ids.tobytes() == got.token_ids.tobytes()
        assert want.columns.keys() == got.columns.keys()
        assert all(
            want.columns[name].tobytes() == got.columns[name].tobytes() for name in want.columns
        )


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_stopped_run_goes_on_with_the_same_bits(stop: int) -> None:
    settings: dict[str, Any] = {"steps": 6, "prompts_per_step": 5, "max_staleness": 2}
    whole = job(1, **settings).train()
    assert '"goes_on": true' in whole.states[stop - 1]
    resumed = job(1, **settings)
    resumed.policy.version = whole.versions[stop - 1]
    resumed.sampler.load_state_dict(json.loads(whole.states[stop - 1]))
    resumed.train(stop)
    assert resumed.states == whole.states[stop:]
    assert [metrics for metrics, _ in resumed.records] == [m for m, _ in whole.records[stop:]]
    assert resumed.engine.asked == whole.engine.asked[stop:]


def test_groups_go_on_when_the_budget_is_taken_back() -> None:
    """A run may resume without rollout.tokens_per_round."""
    before = job(2, steps=1 + 3).train()
    after = job(None, steps=1 + 3)
    after.policy.version = 1
    after.sampler.load_state_dict(json.loads(before.states[0]))
    after.train(1)
    assert after.asked_of(1)[0] == [(1, 2, 4)]
    assert after.records[0][0]["batch/unfinished_groups"] == 0
