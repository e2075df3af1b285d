import json
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from megatron_qlrl.config.schema import CurriculumConfig
from megatron_qlrl.curriculum.retrospective import RetrospectivePool, Seen
from megatron_qlrl.types import Prompt, Score, ScoredGroup


def make_group(uid, values):
    prompt = Prompt(uid, np.zeros(3, np.int32), "toy_musique", "q", "a")
    return ScoredGroup(prompt, (), tuple(Score(value=v, rule=v or 0.0) for v in values))


def make_pool(means, *, seed=7, **settings):
    config = CurriculumConfig.model_validate({"difficulty_eps": 0.1} | settings)
    pool = RetrospectivePool(config, seed=seed)
    for uid, mean in means.items():
        solved = round(mean * 4)
        pool.observe(make_group(uid, [1.0] * solved + [0.0] * (4 - solved)), step=0, phase=0)
    return pool


def chi_square(counts, expected):
    return sum((n - e) ** 2 / e for n, e in zip(counts, expected, strict=True))


# Upper 1 % points of the chi-square distribution with 3 and 11 degrees of freedom.
CHI_SQUARE_3, CHI_SQUARE_11 = 11.345, 24.725
MEANS = {"never": 0.0, "once": 0.25, "half": 0.5, "always": 1.0}
# 1 / (mean + 0.1), at most 6.
WEIGHTS = {"never": 6.0, "once": 1 / 0.35, "half": 1 / 0.6, "always": 1 / 1.1}


def test_weights_by_hand():
    pool = make_pool(MEANS, max_difficulty=6.0)
    assert {uid: pool.weight(uid) for uid in MEANS} == pytest.approx(WEIGHTS, rel=1e-15)
    assert make_pool(MEANS).weight("never") == 10.0  # below the cap of 16


def test_draws_of_one_follow_the_weights():
    pool = make_pool(MEANS, max_difficulty=6.0)
    num = 20_000
    counts = Counter(uid for _ in range(num) for uid in pool.draw(1, list(MEANS)))
    total = sum(WEIGHTS.values())
    found = [counts[uid] for uid in MEANS]
    assert chi_square(found, [num * WEIGHTS[uid] / total for uid in MEANS]) < CHI_SQUARE_3
    assert chi_square(found, [num / 4] * 4) > 100 * CHI_SQUARE_3  # the test can tell


def test_draws_of_two_follow_successive_sampling():
    """P(a, then b) = w_a / W * w_b / (W - w_a), by enumeration."""
    pool = make_pool(MEANS, max_difficulty=6.0)
    num, total = 20_000, sum(WEIGHTS.values())
    counts = Counter(tuple(pool.draw(2, list(MEANS))) for _ in range(num))
    pairs = list(permutations(MEANS, 2))
    expected = [
        num * WEIGHTS[a] / total * WEIGHTS[b] / (total - WEIGHTS[a]) for a, b in pairs
    ]  # fmt: skip
    assert sum(counts.values()) == num
    assert chi_square([counts[p] for p in pairs], expected) < CHI_SQUARE_11


def test_only_what_was_seen_and_may_be_carried_is_drawn():
    pool = make_pool(MEANS)
    assert sorted(pool.draw(9, ["never", "half", "unseen"])) == ["half", "never"]
    assert pool.draw(9, ["unseen"]) == []
    assert pool.draw(0, list(MEANS)) == []
    assert make_pool(MEANS, carry="unsolved").draw(9, list(MEANS)) == ["never"]


def test_a_solved_prompt_is_no_longer_unsolved():
    pool = make_pool(MEANS, carry="unsolved")
    pool.observe(make_group("never", [0.0, 1.0]), step=5, phase=1)
    assert pool.draw(1, list(MEANS)) == []


def test_statistics_are_of_the_newest_group_with_a_verdict():
    pool = make_pool({})
    pool.observe(make_group("a", [1.0, 0.0, 0.0, 0.0]), step=3, phase=0)
    pool.observe(make_group("a", [1.0, None, 0.0]), step=4, phase=1)
    pool.observe(make_group("a", [None, None]), step=5, phase=1)
    pool.observe(make_group("b", [None]), step=5, phase=1)
    assert pool.seen == {"a": Seen(attempts=2, mean=0.5, step=4, phase=1, best=1.0)}


def test_draws_depend_on_seed_and_number_and_survive_a_stop():
    def sequence(pool, num):
        return [pool.draw(2, list(MEANS)) for _ in range(num)]

    whole = sequence(make_pool(MEANS), 20)
    assert whole == sequence(make_pool(MEANS), 20)
    assert whole != sequence(make_pool(MEANS, seed=8), 20)
    assert len({tuple(draw) for draw in whole}) > 3
    stopped = make_pool(MEANS)
    sequence(stopped, 8)
    resumed = make_pool({})
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert sequence(resumed, 12) == whole[8:]
    assert resumed.state_dict() == {
        "draws": 20,
        "seen": {uid: [1, mean, 0, 0, float(mean > 0)] for uid, mean in MEANS.items()},
    }


def dense_pool(*, solved_above):
    settings = {"carry": "unsolved", "difficulty_eps": 0.1}
    pool = RetrospectivePool(
        CurriculumConfig.model_validate(settings), seed=7, solved_above=solved_above
    )
    pool.observe(make_group("near", [0.3, 0.7, None, 0.5]), step=0, phase=0)
    pool.observe(make_group("far", [0.0, 0.3, 0.0, 0.1]), step=0, phase=0)
    pool.observe(make_group("none", [0.0, 0.0]), step=0, phase=0)
    return pool


@pytest.mark.parametrize(
    ("solved_above", "carried"),
    [
        (0.0, ["none"]),
        (0.3, ["far", "none"]),
        (0.5, ["far", "none"]),
        (0.7, ["far", "near", "none"]),
    ],
)
def test_dense_rewards_solve_a_prompt_above_the_threshold(solved_above, carried):
    pool = dense_pool(solved_above=solved_above)
    assert sorted(pool.draw(9, ["near", "far", "none"])) == carried


def test_dense_rewards_weigh_by_their_mean():
    pool = dense_pool(solved_above=0.9)
    # Means: (0.3 + 0.7 + 0.5) / 3 = 0.5; 0.4 / 4 = 0.1; 0.
    weights = [pool.weight(uid) for uid in ("near", "far", "none")]
    assert weights == pytest.approx([1 / 0.6, 1 / 0.2, 1 / 0.1], rel=1e-15)


def test_statistics_of_older_checkpoints_have_no_best():
    pool = RetrospectivePool(CurriculumConfig(carry="unsolved"), seed=7)
    pool.load_state_dict({"draws": 3, "seen": {"a": [2, 0.5, 4, 1], "b": [1, 0.0, 4, 1]}})
    assert pool.seen["a"] == Seen(attempts=2, mean=0.5, step=4, phase=1, best=0.5)
    assert pool.draw(2, ["a", "b"]) == ["b"]
