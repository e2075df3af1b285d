import math

import numpy as np
import pytest

from megatron_qlrl.advantage.filters import has_spread
from megatron_qlrl.advantage.group import group_advantages
from megatron_qlrl.advantage.shaping import shaped_rewards


@pytest.mark.parametrize(
    ("num_tokens", "penalty"),
    [
        (1, 0.0),
        (8_999, 0.0),
        (9_000, 0.0),
        (9_001, 0.001),
        (9_500, 0.5),
        (9_999, 0.999),
        (10_000, 1.0),
        (10_001, 1.0),
    ],
)
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_penalty_over_a_buffer_of_1000_of_10000_tokens(num_tokens, penalty, reward):
    got = shaped_rewards(
        np.array([reward]), np.array([num_tokens]), max_tokens=10_000, buffer_tokens=1_000
    )
    assert got.tolist() == [reward - penalty]


def test_no_verdict_stays_no_verdict():
    rewards = np.array([math.nan, 1.0])
    got = shaped_rewards(rewards, np.array([10, 10]), max_tokens=10, buffer_tokens=5)
    assert np.isnan(got[0])
    assert got[1] == 0.0
    assert rewards[1] == 1.0  # the raw reward is left alone


def test_length_alone_gives_an_advantage_but_no_place_in_the_batch():
    raw = np.array([1.0, 1.0])
    shaped = shaped_rewards(raw, np.array([4, 10]), max_tokens=10, buffer_tokens=5)
    assert shaped.tolist() == [1.0, 0.0]
    assert group_advantages(shaped, "dr_grpo").tolist() == [0.5, -0.5]
    assert not has_spread(raw)
