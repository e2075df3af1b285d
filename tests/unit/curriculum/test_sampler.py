"""Dynamic sampling with a hand-written engine that knows what each prompt earns."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from megatron_qlrl.config.schema import AlgorithmConfig, CurriculumConfig
from megatron_qlrl.curriculum.curriculum import Curriculum
from megatron_qlrl.curriculum.sampler import Batch, Sampler
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup


def spread(rewards):
    judged = rewards[np.isfinite(rewards)]
    return bool(judged.size) and bool(judged.max() > judged.min())


class Setup:
    """`solved` prompts have rewards with a spread; all others fail. Each engine call is noted."""

    def __init__(self, num=12, *, solved=(), lengths=(), share=0.0, **settings):
        self.solved = set(solved)
        self.version = 0
        self.calls: list[tuple[int, list[str]]] = []
        self.warnings: list[str] = []
        tokens = [5] * num + list(lengths)
        prompts = [
            Prompt(f"f:{i}", np.zeros(n, np.int32), "s", "q", "a") for i, n in enumerate(tokens)
        ]
        limits = [10, 20] if lengths else [10]
        curriculum = CurriculumConfig.model_validate({})
        self.sampler = Sampler(
            Curriculum(prompts, limits=limits, seed=0, config=curriculum),
            config=AlgorithmConfig.model_validate(settings),
            prompts_per_step=0,
            carried_share=share,
            keep=spread,
            warn=self.warnings.append,
        )

    def fill(self, phase: int, step: int, num_prompts: int) -> Batch:
        """A whole step of so many prompts, as the loop does it."""
        self.sampler._prompts_per_step = num_prompts
        self.sampler.begin(phase, step, version=self.version)
        while prompts := self.sampler.draw():
            self.sampler.observe(self.collect(prompts, step))
        return self.sampler.take()

    def collect(self, prompts: Sequence[Prompt], step: int) -> list[ScoredGroup]:
        self.calls.append((step, [p.uid for p in prompts]))
        return [self.group(p, step) for p in prompts]

    def group(self, prompt: Prompt, step: int) -> ScoredGroup:
        def rollout(k: int) -> Rollout:
            ids = np.array([step, k], np.int32)
            logprobs = np.array([-0.1, -1 / 3], np.float32)
            return Rollout(prompt.uid, k, ids, logprobs, f"{step} {k}", k == 0, self.version)

        values = (1.0, 0.0 if prompt.uid in self.solved else 1.0)
        return ScoredGroup(
            prompt, tuple(map(rollout, range(2))), tuple(Score(v, v) for v in values)
        )

    def hold(self, waiting):
        """As the loop does it: with old log-probs."""
        old = np.array([-0.2, -0.7], np.float32)
        self.sampler.hold(
            [g if g.old_logprobs else replace(g, old_logprobs=(old, old)) for g in waiting]
        )


def uids(groups):
    return [g.prompt.uid for g in groups]


EVEN = [f"f:{i}" for i in range(0, 12, 2)]
ALL = [f"f:{i}" for i in range(12)]
MORE = [f"f:{i}" for i in range(18)]


def test_one_round_leaves_an_incomplete_batch_as_it_is():
    setup = Setup(solved=EVEN)
    batch = setup.fill(0, 3, 6)
    (call,) = setup.calls
    assert call == (3, uids(batch.generated))
    assert uids(batch.groups) == [uid for uid in call[1] if uid in EVEN]
    assert batch.metrics["batch/exhausted"] == 0
    assert batch.metrics["batch/filtered_groups"] == 6 - len(batch.groups) > 0
    assert setup.warnings == []


def test_rounds_draw_what_is_missing_until_the_batch_is_full():
    setup = Setup(solved=EVEN, generation_rounds=10)
    batch = setup.fill(0, 0, 6)
    assert sorted(uids(batch.groups)) == sorted(EVEN)
    drawn = [uid for _, call in setup.calls for uid in call]
    assert drawn == uids(batch.generated)
    assert len(drawn) == len(set(drawn))
    missing, left = 6, 12
    for _, call in setup.calls:
        assert len(call) == min(missing, left)
        missing -= len(set(call) & set(EVEN))
        left -= len(call)
    assert batch.metrics["batch/rounds"] == len(setup.calls) > 1
    assert batch.metrics["batch/kept_groups"] == 6
    assert batch.metrics["batch/exhausted"] == 0


@pytest.mark.parametrize("what", ["train", "skip"])
def test_rounds_without_any_spread_end_and_are_counted(what):
    setup = Setup(num=40, generation_rounds=3, incomplete_batch=what)
    for step in range(4):
        batch = setup.fill(0, step, 8)
        setup.hold(batch.waiting)
        assert batch.groups == []
        assert len(batch.generated) == 24
        assert batch.metrics["batch/rounds"] == 3
        assert batch.metrics["batch/exhausted"] == 1
        assert batch.metrics["batch/filtered_groups"] == 24
    assert [step for step, _ in setup.calls] == [s for s in range(4) for _ in range(3)]
    assert len(setup.warnings) == 4
    assert "step 2: 0 of 8 groups carry a gradient after 3 rounds (24 groups" in setup.warnings[2]
    assert setup.sampler.curriculum.metrics(0)["curriculum/new/drawn"] == 96
    assert setup.sampler.curriculum.metrics(0)["curriculum/new/reached"] == 0


def test_a_pool_that_is_used_up_ends_the_rounds():
    """No prompt comes twice in a step: its responses would be the same tokens again."""
    setup = Setup(solved=EVEN[:2], generation_rounds=10)
    batch = setup.fill(0, 0, 5)
    assert sorted(uids(batch.generated)) == sorted(ALL)
    assert sorted(uids(batch.groups)) == EVEN[:2]
    assert batch.metrics["batch/exhausted"] == 1
    assert "2 of 5 groups" in setup.warnings[0] and "training on what" in setup.warnings[0]


def test_a_batch_larger_than_the_pool_is_the_pool():
    setup = Setup(num=3, solved=ALL, generation_rounds=4)
    batch = setup.fill(0, 0, 8)
    assert len(batch.groups) == 3
    assert (batch.metrics["batch/rounds"], batch.metrics["batch/exhausted"]) == (1, 0)


def test_an_incomplete_batch_that_is_skipped_waits():
    setup = Setup(solved=EVEN[:2], generation_rounds=9, incomplete_batch="skip", max_staleness=5)
    batch = setup.fill(0, 0, 3)
    assert batch.groups == []
    assert sorted(uids(batch.waiting)) == EVEN[:2]
    assert "no update in this step" in setup.warnings[0]
    setup.hold(batch.waiting)
    setup.solved.add("f:11")
    batch = setup.fill(0, 1, 3)
    assert sorted(uids(batch.groups)) == ["f:0", "f:11", "f:2"]
    assert not set(uids(batch.generated)) & set(EVEN[:2])


def test_surplus_is_dropped_without_staleness():
    setup = Setup(solved=ALL, oversampling=1.5)
    batch = setup.fill(0, 0, 4)
    assert (len(batch.generated), len(batch.groups), batch.waiting) == (6, 4, [])
    assert batch.metrics["batch/dropped_groups"] == 2
    assert batch.metrics["batch/held_groups"] == 0


def test_surplus_comes_first_in_the_next_step():
    setup = Setup(solved=ALL, oversampling=1.5, max_staleness=1)
    first = setup.fill(0, 0, 4)
    assert len(first.waiting) == first.metrics["batch/held_groups"] == 2
    setup.hold(first.waiting)
    setup.version = 1
    second = setup.fill(0, 1, 4)
    assert uids(second.groups)[:2] == uids(first.waiting)
    assert [g.old_logprobs is not None for g in second.groups] == [True, True, False, False]
    assert len(second.generated) == 3  # two are missing, times 1.5
    assert not set(uids(second.generated)) & set(uids(first.waiting))
    assert second.metrics["batch/staleness/max"] == 1
    assert second.metrics["batch/staleness/mean"] == 0.5
    assert setup.sampler.curriculum.metrics(0)["curriculum/new/reached"] == 8


def test_a_step_of_groups_that_waited_generates_nothing():
    setup = Setup(solved=ALL, oversampling=2, max_staleness=9)
    setup.hold(setup.fill(0, 0, 4).waiting)
    batch = setup.fill(0, 1, 4)
    assert len(batch.groups) == 4
    assert batch.generated == []
    assert batch.metrics["batch/rounds"] == 0


@pytest.mark.parametrize(("version", "phase", "used"), [(2, 0, 2), (3, 0, 0), (0, 1, 0)])
def test_groups_too_old_or_of_an_earlier_phase_expire(version, phase, used):
    setup = Setup(solved=MORE, lengths=[15] * 6, oversampling=1.5, max_staleness=2)
    setup.hold(setup.fill(0, 0, 4).waiting)
    setup.version = version
    batch = setup.fill(phase, 1, 4)
    assert sum(g.old_logprobs is not None for g in batch.groups) == used
    assert batch.metrics["batch/expired_groups"] == 2 - used
    assert len(batch.groups) == 4


def test_carried_prompts_of_all_rounds_stay_within_their_share():
    """A quarter of 8: two, though every round could draw some."""
    setup = Setup(lengths=[15] * 40, share=0.25, generation_rounds=4)
    setup.fill(0, 0, 12)
    for step in range(1, 5):
        batch = setup.fill(1, step, 8)
        assert sum(g.prompt.num_tokens == 5 for g in batch.generated) == 2
        assert len(batch.generated) == 32


def test_a_stopped_sampler_goes_on_with_the_same_bits():
    settings = {"oversampling": 1.5, "max_staleness": 9, "generation_rounds": 3}

    def step(setup, number):
        setup.version = number
        batch = setup.fill(0, number, 4)
        setup.hold(batch.waiting)
        return uids(batch.groups), uids(batch.generated), batch.metrics

    whole = Setup(solved=EVEN, **settings)
    expected = [step(whole, n) for n in range(6)]
    assert any(metrics["batch/staleness/max"] for _, _, metrics in expected[3:])
    stopped, resumed = Setup(solved=EVEN, **settings), Setup(solved=EVEN, **settings)
    for n in range(3):
        step(stopped, n)
    resumed.sampler.load_state_dict(json.loads(json.dumps(stopped.sampler.state_dict())))
    assert [step(resumed, n) for n in range(3, 6)] == expected[3:]
    assert resumed.sampler.state_dict() == whole.sampler.state_dict()
