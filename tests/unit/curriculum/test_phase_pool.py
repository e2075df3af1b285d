import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_qlrl.curriculum.phase_pool import PhasePool
from megatron_qlrl.errors import DataError
from megatron_qlrl.types import Prompt


def make_prompt(uid, num_tokens=5):
    return Prompt(uid, np.zeros(num_tokens, np.int32), "toy_musique", "q", "a")


def make_pool(size, *, seed=0, phase=1, max_tokens=9):
    prompts = [make_prompt(f"f:{i}") for i in range(size)]
    return PhasePool(prompts, phase=phase, min_tokens=0, max_tokens=max_tokens, seed=seed)


def uids(prompts):
    return [p.uid for p in prompts]


def test_lower_bound_is_open_and_upper_bound_closed():
    prompts = [make_prompt(f"f:{n}", n) for n in (19, 20, 21, 60, 61)]
    pool = PhasePool(prompts, phase=1, min_tokens=20, max_tokens=60, seed=0)
    assert len(pool) == 2
    assert set(uids(pool.draw(2))) == {"f:21", "f:60"}


@pytest.mark.parametrize(
    ("lengths", "seen"), [([5, 7, 90], "seen: 5 to 90 tokens"), ([], "no prompts at all")]
)
def test_an_empty_pool_names_the_phase_and_the_lengths(lengths, seen):
    prompts = [make_prompt(f"f:{n}", n) for n in lengths]
    with pytest.raises(DataError, match=f"phase 2 .*20 < tokens <= 60.*{seen}"):
        PhasePool(prompts, phase=2, min_tokens=20, max_tokens=60, seed=0)


def test_order_depends_on_seed_phase_and_epoch_alone():
    def order(**kwargs):
        return uids(make_pool(20, **kwargs).draw(20))

    assert order() == order()
    assert order() != order(seed=1)
    assert order() != order(phase=0)
    pool = make_pool(20)
    assert uids(pool.draw(20)) != uids(pool.draw(20))
    chunked = make_pool(20)
    assert uids(chunked.draw(3)) + uids(chunked.draw(17)) == order()


def test_a_draw_larger_than_the_pool_shrinks_to_the_pool():
    pool = make_pool(3)
    for _ in range(4):
        assert sorted(uids(pool.draw(8))) == ["f:0", "f:1", "f:2"]


def test_a_wrapping_draw_has_no_prompt_twice_and_loses_none():
    # The draws of 4 from 5 wrap at 4, 8, 12, 16: five draws are exactly four epochs.
    pool = make_pool(5)
    draws = [uids(pool.draw(4)) for _ in range(5)]
    assert all(len(set(d)) == 4 for d in draws)
    assert Counter(uid for d in draws for uid in d) == {f"f:{i}": 4 for i in range(5)}


@pytest.mark.parametrize("seed", range(6))
def test_a_prompt_that_waits_is_the_first_of_the_next_draw(seed):
    whole = make_pool(5, seed=seed)
    first_epoch, second_epoch = uids(whole.draw(5)), uids(whole.draw(5))
    pool = make_pool(5, seed=seed)
    last = first_epoch[4]
    others = [uid for uid in second_epoch if uid != last]
    assert uids(pool.draw(4)) == first_epoch[:4]
    assert uids(pool.draw(4)) == [last, *others[:3]]
    waited = last in second_epoch[:4] and second_epoch.index(last) < second_epoch.index(others[2])
    expected = [last, others[3]] if waited else second_epoch[3:]
    assert uids(pool.draw(2)) == expected


def test_taken_prompts_wait_for_the_next_draw():
    order = uids(make_pool(6).draw(6))
    pool = make_pool(6)
    taken = [order[0], order[2], "another phase's"]
    assert uids(pool.draw(2, taken)) == [order[1], order[3]]
    assert uids(pool.draw(4)) == [order[0], order[2], order[4], order[5]]


def test_a_pool_taken_whole_gives_nothing():
    pool = make_pool(3)
    assert pool.draw(2, ["f:0", "f:1", "f:2"]) == []
    assert uids(pool.draw(2, ["f:0", "f:2"])) == ["f:1"]


@given(st.integers(1, 12), st.lists(st.integers(0, 15), max_size=20), st.integers(0, 3))
def test_every_prompt_comes_once_an_epoch(size, draws, seed):
    pool = make_pool(size, seed=seed)
    counts = Counter({f"f:{i}": 0 for i in range(size)})
    for n in draws:
        drawn = uids(pool.draw(n))
        assert len(drawn) == len(set(drawn)) == min(n, size)
        counts.update(drawn)
        total = sum(counts.values())
        assert min(counts.values()) == total // size
        assert max(counts.values()) == math.ceil(total / size)


@given(
    st.integers(1, 12), st.lists(st.integers(0, 15), min_size=1, max_size=12), st.integers(0, 11)
)
def test_resume_at_any_point_goes_on_the_same(size, draws, cut):
    cut = min(cut, len(draws))
    pool = make_pool(size)
    for n in draws[:cut]:
        pool.draw(n)
    state = json.loads(json.dumps(pool.state_dict()))
    resumed = make_pool(size)
    resumed.draw(2)
    resumed.load_state_dict(state)
    assert resumed.epoch == pool.epoch
    for n in draws[cut:]:
        assert uids(resumed.draw(n)) == uids(pool.draw(n))
    assert resumed.state_dict() == pool.state_dict()


def test_state_taken_earlier_does_not_change_later():
    pool = make_pool(4)
    pool.draw(1)
    state = pool.state_dict()
    before = json.dumps(state)
    pool.draw(2)
    assert json.dumps(state) == before
