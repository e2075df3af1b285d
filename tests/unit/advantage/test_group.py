import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_qlrl.advantage.group import group_advantages

NAN = math.nan


def test_grpo_divides_by_the_unbiased_std():
    # mean 0.25; squares 0.5625 + 3 * 0.0625 = 0.75; std = sqrt(0.75 / 3) = 0.5.
    got = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), "grpo")
    scale = 0.5 + 1e-6
    np.testing.assert_allclose(
        got, [0.75 / scale, -0.25 / scale, -0.25 / scale, -0.25 / scale], rtol=1e-14
    )
    assert got.dtype == np.float64


def test_dr_grpo_only_subtracts_the_mean():
    got = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), "dr_grpo")
    assert got.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_rloo_subtracts_the_mean_of_the_others():
    # 1 - 0; 0 - (1 + 0 + 0) / 3.
    got = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), "rloo")
    np.testing.assert_allclose(got, [1.0, -1 / 3, -1 / 3, -1 / 3], rtol=1e-14)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize(
    "rewards",
    [[1.0], [NAN], [NAN, NAN], [1.0, NAN, NAN], [0.0, 0.0, 0.0], [0.1, 0.1, 0.1], []],
)
def test_nothing_to_compare_with_gives_zeros(kind, rewards):
    assert group_advantages(np.array(rewards), kind).tolist() == [0.0] * len(rewards)


def test_no_verdict_is_left_out_of_the_statistics():
    # Of 1 and 0: mean 0.5, std = sqrt((0.25 + 0.25) / 1) = sqrt(0.5).
    got = group_advantages(np.array([1.0, NAN, 0.0]), "grpo")
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    np.testing.assert_allclose(got, [expected, 0.0, -expected], rtol=1e-14)
    assert group_advantages(np.array([NAN, 3.0, 1.0]), "rloo").tolist() == [0.0, 2.0, -2.0]


def test_dense_rewards_by_hand():
    # 0.3, 0.7, 0.5: mean 0.5; squares 0.04 + 0.04 + 0; std = sqrt(0.08 / 2) = 0.2.
    rewards = np.array([0.3, NAN, 0.7, 0.5])
    grpo = [-0.2 / (0.2 + 1e-6), 0.0, 0.2 / (0.2 + 1e-6), 0.0]
    np.testing.assert_allclose(group_advantages(rewards, "grpo"), grpo, atol=1e-14)
    np.testing.assert_allclose(
        group_advantages(rewards, "dr_grpo"), [-0.2, 0.0, 0.2, 0.0], atol=1e-15
    )
    # 0.3 - 0.6; 0.7 - 0.4; 0.5 - 0.5.
    np.testing.assert_allclose(group_advantages(rewards, "rloo"), [-0.3, 0.0, 0.3, 0.0], atol=1e-15)


def test_the_input_is_left_alone():
    rewards = np.array([1.0, 0.0])
    group_advantages(rewards, "grpo")
    assert rewards.tolist() == [1.0, 0.0]


@given(
    hnp.arrays(
        np.float64,
        st.integers(0, 9),
        elements=st.one_of(st.just(NAN), st.floats(-2, 2, allow_subnormal=False)),
    ),
    st.sampled_from(["grpo", "dr_grpo", "rloo"]),
)
def test_advantages_are_finite_and_sum_to_zero(rewards, kind):
    got = group_advantages(rewards, kind)
    assert np.isfinite(got).all()
    assert abs(got.sum()) < 1e-6
    assert (got[np.isnan(rewards)] == 0).all()
