"""Seeds, the share of each engine, and the groups made of an engine's answers."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_qlrl.errors import RewardError, StopRequested, SyncError
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.rollout import collect as collect_file
from megatron_qlrl.rollout import vllm_engine
from megatron_qlrl.rollout.collect import Collector, check_masked, collect_groups
from megatron_qlrl.rollout.seeds import share_prompts, token_seed
from megatron_qlrl.rollout.vllm_engine import Completion, Request, Sampling
from megatron_qlrl.types import Prompt, Score, ScoredGroup

pytestmark = pytest.mark.usefixtures("lone_group")


def prompt(uid: str, num_tokens: int = 3) -> Prompt:
    return Prompt(uid, np.arange(num_tokens, dtype=np.int32), "docqa", "?", "!")


def test_seed_never_changes() -> None:
    """Pinned: another value would make resumed and repeated runs draw other tokens."""
    seed = token_seed(run_seed=0, step=3, prompt_uid="train:17", sample=5)
    assert seed == 9194752490659632861
    again = token_seed(run_seed=0, step=3, prompt_uid="train:17", sample=5)
    assert again == seed


def test_seeds_are_distinct_and_fit_the_engine() -> None:
    seeds = {
        token_seed(run_seed=run, step=step, prompt_uid=uid, sample=sample)
        for run in (0, 1)
        for step in (-1, 0, 1, 11)
        for uid in ("a:1", "a:11", "b:1", "a:1/1")
        for sample in (0, 1, 11)
    }
    assert len(seeds) == 2 * 4 * 4 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_longest_prompt_first_to_the_least_loaded_engine() -> None:
    # 9 | 7, 6 to the second (13), 5 to the first (14), 2 to the second (15)
    prompts = [prompt("a", 2), prompt("b", 9), prompt("c", 6), prompt("d", 7), prompt("e", 5)]
    assert share_prompts(prompts, 2) == [[1, 4], [0, 2, 3]]
    assert share_prompts(prompts[:1], 3) == [[0], [], []]
    assert share_prompts([], 2) == [[], []]


@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 6))
def test_shares_cover_every_prompt_once_and_are_balanced(lengths: list[int], engines: int) -> None:
    prompts = [prompt(str(i), n) for i, n in enumerate(lengths)]
    shares = share_prompts(prompts, engines)
    assert len(shares) == engines
    assert sorted(sum(shares, [])) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


class FakeEngine:
    """Answer n is n + 1 tokens, each of them n; the even ones ended by themselves. They end in
    another order than they were asked for."""

    num_engines, engine_index, leads = 1, 0, True
    stops = False

    def __init__(self) -> None:
        self.calls: list[Any] = []

    @contextmanager
    def awake(self, weights: Iterable[Any], version: int) -> Iterator[Any]:
        self.calls.append(("awake", list(weights), version))
        try:
            yield self.generate
        finally:
            self.calls.append("asleep")

    def probe(self, prompt_ids: np.ndarray, num_tokens: int) -> Any:
        self.calls.append(("probe", prompt_ids.tolist(), num_tokens))
        return "answer"

    def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        self.calls.append((requests, sampling))
        for n in sorted(range(len(requests)), key=lambda n: (n % 2 == 0, -n)):
            ids, logprobs = np.full(n + 1, n, np.int32), np.full(n + 1, -0.5 * n, np.float32)
            yield n, Completion(ids, logprobs, n % 2 == 0)
            if self.stops:
                raise StopRequested("asked")

    def take_counts(self) -> dict[str, float]:
        some = {"prefill_tokens": 8.0, "prefill_s": 2.0}
        return dict.fromkeys(vllm_engine.COUNTS, 0.0) | some


class FakeScorer:
    """Pays for even responses; a response is its tokens with points between. It has no verdict on
    the responses in `silent_on`."""

    last_failure = "no verdict on 3"
    silent_on: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def score(self, prompt: Prompt, response: str) -> Future[Score]:
        self.asked.append((prompt.uid, response))
        value = float(int(response.split(".", maxsplit=1)[0]) % 2 == 0)
        done: Future[Score] = Future()
        done.set_result(Score(None if response in self.silent_on else value, value))
        return done

    def take_counts(self) -> dict[str, float]:
        return {}

    def take_custom_counts(self) -> dict[str, float]:
        return {}


PROMPTS = [prompt("a:0", 2), prompt("a:1", 4)]
SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_tokens=8, n=3)


@pytest.fixture
def made() -> tuple[Collector, FakeEngine, FakeScorer]:
    engine, scorer = FakeEngine(), FakeScorer()
    collector = Collector(
        engine=lambda: engine,  # pyright: ignore[reportArgumentType]
        weights=lambda: (iter(["weights"]), 12),  # pyright: ignore[reportArgumentType]
        decode=lambda ids: ".".join(map(str, ids)),
        scorer=scorer,
        run_seed=4,
        max_masked_share=0.0,
    )
    return collector, engine, scorer


def test_groups_of_an_engines_answers(made: tuple[Collector, FakeEngine, FakeScorer]) -> None:
    collector, engine, scorer = made
    with collector.session(SAMPLING, step=9, meter=Meter()) as collect:
        groups = collect(PROMPTS)
    (_, (requests, how), _) = engine.calls  # one call: the engine batches
    assert how is SAMPLING
    assert [len(r.prompt_ids) for r in requests] == [2, 2, 2, 4, 4, 4]
    want = [
        token_seed(run_seed=4, step=9, prompt_uid=p.uid, sample=s)
        for p in PROMPTS
        for s in range(3)
    ]
    assert [r.seed for r in requests] == want
    assert [g.prompt.uid for g in groups] == ["a:0", "a:1"]
    flat = [r for group in groups for r in group.rollouts]
    assert [(r.prompt_uid, r.sample) for r in flat] == [
        (uid, sample) for uid in ("a:0", "a:1") for sample in range(3)
    ]
    assert [r.text for r in flat[:3]] == ["0", "1.1", "2.2.2"]
    assert [r.token_ids.tolist() for r in flat[3:5]] == [[3] * 4, [4] * 5]
    assert [r.engine_logprobs.tolist() for r in flat[:2]] == [[0.0], [-0.5, -0.5]]
    assert [r.finished for r in flat] == [True, False] * 3
    assert {r.weight_version for r in flat} == {12}
    assert [g.rewards.tolist() for g in groups] == [[1, 0, 1], [0, 1, 0]]
    # each was scored as it ended, with its own prompt
    ended = [("a:1", 5), ("a:1", 3), ("a:0", 1), ("a:1", 4), ("a:0", 2), ("a:0", 0)]
    assert scorer.asked == [(uid, ".".join([str(n)] * (n + 1))) for uid, n in ended]


def test_engine_wakes_once_at_the_first_call_and_sleeps_at_the_end(
    made: tuple[Collector, FakeEngine, FakeScorer],
) -> None:
    collector, engine, _ = made
    meter = Meter()
    with collector.session(SAMPLING, step=0, meter=meter) as collect:
        assert engine.calls == []
        collect(PROMPTS)
        collect(PROMPTS[:1])
    assert engine.calls[0] == ("awake", ["weights"], 12)
    assert engine.calls[-1] == "asleep"
    assert len(engine.calls) == 4
    metrics = meter.summary()
    assert metrics.pop("perf/prefill_tokens_per_s") == 4
    own = {name for name in metrics if not name.startswith("perf/engine/")}
    assert own == {f"timing_s/{name}" for name in ("update_weights", "gen", "reward")}
    assert metrics["perf/engine/prefill_tokens/sum"] == 8

    with collector.session(SAMPLING, step=0, meter=Meter()):
        pass
    assert len(engine.calls) == 4  # nothing was asked for


class FakeProbe:
    prompt_ids, num_tokens = np.array([4, 5], np.int32), 3
    answers: tuple[Any, ...] = ()

    def check(self, answer: Any) -> dict[str, float]:
        self.answers += (answer,)
        if answer is None:
            raise SyncError("stale")
        return {"training/probe_prefill_error": 1.5}


def test_the_probe_is_asked_once_after_the_weights(
    made: tuple[Collector, FakeEngine, FakeScorer],
) -> None:
    collector, engine, _ = made
    collector, meter = replace(collector, probe=FakeProbe()), Meter()
    with collector.session(SAMPLING, step=0, meter=meter) as collect:
        collect(PROMPTS)
        collect(PROMPTS)
    assert [call[0] for call in engine.calls[:2]] == ["awake", "probe"]
    assert engine.calls[1] == ("probe", [4, 5], 3)
    assert collector.probe.answers == ("answer",)  # pyright: ignore
    assert meter.summary()["training/probe_prefill_error"] == 1.5
    assert meter.seconds("probe") > 0

    engine.leads = False  # its answer is that of its leader
    with (
        pytest.raises(SyncError, match="stale"),
        collector.session(SAMPLING, step=0, meter=Meter()) as collect,
    ):
        collect(PROMPTS)
    assert engine.calls[-1] == "asleep"


def test_a_stop_puts_the_engine_to_sleep(made: tuple[Collector, FakeEngine, FakeScorer]) -> None:
    collector, engine, _ = made
    engine.stops = True
    with (
        pytest.raises(StopRequested, match="asked"),
        collector.session(SAMPLING, step=0, meter=Meter()) as collect,
    ):
        collect(PROMPTS)
    assert engine.calls[-1] == "asleep"


def test_engine_without_prompts_makes_no_groups(
    made: tuple[Collector, FakeEngine, FakeScorer],
) -> None:
    with made[0].session(SAMPLING, step=0, meter=Meter()) as collect:
        assert collect([]) == []


def ranks(monkeypatch: pytest.MonkeyPatch, groups: dict[int, ScoredGroup]) -> list[Any]:
    """Has `collect_groups` run as the second of two ranks, of which the first offers `groups`.
    Returns what the second one offers, once it does."""
    offered: list[Any] = []

    def gather(mine: Any) -> list[Any]:
        if mine == "":  # no rank stops
            return ["", ""]
        offered.append(mine)
        return [(groups, ""), mine]

    monkeypatch.setattr(collect_file, "gather_objects", gather)
    return offered


def test_an_engine_answers_its_share_and_gets_the_others(
    made: tuple[Collector, FakeEngine, FakeScorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    collector, engine, scorer = made
    engine.num_engines, engine.engine_index = 2, 1
    theirs = group(1.0, 0.0, 0.0)
    ranks(monkeypatch, {1: theirs})
    prompts = [*PROMPTS, prompt("a:2", 3)]  # 4 to the first engine, 3 and 2 to the second
    groups = collect_groups(collector, prompts, engine.generate, 12, SAMPLING, 9, Meter())
    ((requests, _),) = engine.calls
    assert [len(r.prompt_ids) for r in requests] == [2, 2, 2, 3, 3, 3]
    assert requests[3].seed == token_seed(run_seed=4, step=9, prompt_uid="a:2", sample=0)
    assert groups[1] is theirs
    assert [g.prompt.uid for g in (groups[0], groups[2])] == ["a:0", "a:2"]
    assert [groups[k].rewards.tolist() for k in (0, 2)] == [[1, 0, 1], [0, 1, 0]]
    assert {uid for uid, _ in scorer.asked} == {"a:0", "a:2"}


def test_a_rank_that_does_not_lead_generates_and_takes_the_leaders_groups(
    made: tuple[Collector, FakeEngine, FakeScorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    collector, engine, scorer = made
    engine.leads = False
    leaders = {0: group(1.0, 0.0, 1.0), 1: group(0.0, 0.0, 1.0)}
    offered = ranks(monkeypatch, leaders)
    groups = collect_groups(collector, PROMPTS, engine.generate, 12, SAMPLING, 9, Meter())
    ((requests, _),) = engine.calls
    assert len(requests) == 6  # its part of every layer is needed
    assert scorer.asked == []
    assert offered == [({}, "no verdict on 3")]
    assert groups == list(leaders.values())


def test_responses_without_a_verdict_stop_the_batch(
    made: tuple[Collector, FakeEngine, FakeScorer],
) -> None:
    collector, engine, scorer = made
    scorer.silent_on = ("1.1",)
    with (
        pytest.raises(RewardError, match=r"no verdict on 1 of 6 responses.*\(no verdict on 3\)"),
        collector.session(SAMPLING, step=0, meter=Meter()) as collect,
    ):
        collect(PROMPTS)
    assert engine.calls[-1] == "asleep"
    some = replace(collector, max_masked_share=0.2)
    with some.session(SAMPLING, step=0, meter=Meter()) as collect:
        groups = collect(PROMPTS)
    assert [score.value for score in groups[0].scores] == [1.0, None, 1.0]


def test_own_rewards_that_fail_are_counted_and_told(
    made: tuple[Collector, FakeEngine, FakeScorer],
) -> None:
    collector, _, scorer = made
    counts = {"asked": 6.0, "no_verdict": 1.0, "raised": 2.0, "invalid": 0.0}
    counts |= {"timeout": 1.0, "crashed": 0.0, "seconds": 3.0}
    told: list[str] = []
    scorer.take_custom_counts = lambda: counts  # pyright: ignore[reportAttributeAccessIssue]
    scorer.last_failure = "reward.custom: m:f returned 2.0"
    meter = Meter()
    with replace(collector, warn=told.append).session(SAMPLING, step=0, meter=meter) as collect:
        collect(PROMPTS)
    assert told == [
        "own rewards failed on 3 of 6 responses, which have no verdict (raised 2, timeout 1); the "
        "last reason: reward.custom: m:f returned 2.0"
    ]
    assert meter.summary()["reward/custom/raised"] == 2.0


def group(*values: float | None) -> ScoredGroup:
    prompt = Prompt("f:0", np.zeros(1, np.int32), "musique", "?", "!")
    return ScoredGroup(prompt, (), tuple(Score(v, v or 0.0) for v in values))


@pytest.mark.parametrize(
    ("share", "stops"), [(0.0, True), (0.24, True), (0.25, False), (1.0, False)]
)
def test_a_share_above_the_limit_stops(share: float, stops: bool) -> None:
    groups = [group(1.0, None, 0.0, 0.0), group(1.0, None, 1.0, 0.0)]
    if not stops:
        check_masked(groups, max_share=share, reason="")
        return
    with pytest.raises(RewardError, match=r"2 of 8 responses.*\(http://j: gone\).*resumes"):
        check_masked(groups, max_share=share, reason="http://j: gone")


def test_without_masked_samples_nothing_stops() -> None:
    check_masked([group(0.0, 0.0)], max_share=0.0, reason="")
