"""The simulation of generation against sums by hand, on engines of round speeds."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_qlrl.config.schema import AlgorithmConfig, RolloutConfig
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.plan.estimate import Engine
from megatron_qlrl.plan.flops import prefill_flops
from megatron_qlrl.plan.lengths import (
    SIDES,
    Draw,
    Generation,
    Ran,
    logged,
    lognormal,
    mean_tokens,
    read_lengths,
    run_engine,
    run_round,
    simulate,
    summarise,
)
from megatron_qlrl.types import Prompt
from tests.unit.plan.test_memory import TINY

# A second for a step, a tenth for each token of the cache, nothing to read prompts.
ENGINE = Engine(TINY, slots=2.9, step_s=1.0, token_s=0.1, flops=math.inf)
FREE = replace(ENGINE, slots=100, token_s=0.0)


def test_a_response_that_ends_makes_room_for_the_next() -> None:
    """Three responses on two slots: 3, 1 and 2 tokens on a prompt of 10.

    Step 1 samples the first two on 20 tokens. Then the third joins with 10, beside 11: steps 2 and
    3 read 21 and 23 tokens.
    """
    ran = run_engine(ENGINE, [(10, [(0, 3), (0, 1), (0, 2)])])
    assert ran == Ran(0.0, pytest.approx(3 + 2.0 + 2.1 + 2.3), steps=3, tokens=6, width=2)


def test_begun_responses_are_read_again_and_lie_in_the_cache() -> None:
    engine = replace(ENGINE, flops=1e3)
    ran = run_engine(engine, [(20, [(4, 1)]), (10, [])])
    assert ran.decode_s == pytest.approx(1 + 2.4)
    # What is begun goes on from the prompt, like a longer prompt.
    reads = prefill_flops(TINY, 24) + prefill_flops(TINY, 10)
    assert ran.read_s == pytest.approx(reads / 1e3)


def test_three_prompts_on_two_engines() -> None:
    """Equal prompts go to the engines by turns: the first and the third to one of them."""
    prompts = [Prompt(str(n), np.zeros(10, np.int32), "", "", "") for n in range(3)]
    first, second = run_round(FREE, 2, prompts, [[(0, 5)], [(0, 2)], [(0, 3)]])
    assert first == Ran(0.0, 5.0, steps=5, tokens=8, width=2)
    assert second == Ran(0.0, 2.0, steps=2, tokens=2, width=1)


def test_a_round_lasts_as_long_as_its_slowest_engine() -> None:
    rounds = [
        [Ran(1.0, 5.0, 5, 8, 2), Ran(0.0, 2.0, 2, 2, 1)],
        [Ran(0.0, 1.0, 1, 1, 1), Ran(0.0, 2.0, 2, 2, 1)],
    ]
    # 5 steps of 3 slots and 2 of 2 are 19, with 13 tokens; of 2 x 8 seconds 11 are busy.
    assert summarise(rounds, steps=2, stale_share=0.5) == Generation(
        read_s=0.5, decode_s=3.5, tokens=6.5, rounds=1.0,
        engines_idle=pytest.approx(5 / 16), slots_idle=pytest.approx(6 / 19), stale_share=0.5,
    )  # fmt: skip


def generation(side: Any, draw: Draw, *, budget: int | None = None, **settings: Any) -> Generation:
    rollout = {"prompts_per_step": 2, "group_size": 2, "max_response_tokens": 8}
    algorithm = {"max_staleness": 4} | settings
    return simulate(
        side, draw, engine=FREE, num_engines=1, prompt_tokens=10,
        rollout=RolloutConfig.model_validate(rollout),
        algorithm=AlgorithmConfig.model_validate(algorithm), tokens_per_round=budget, warm_up=8,
    )  # fmt: skip


def short_and_long(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.array([2, 6])


def test_plain_waits_for_the_longest() -> None:
    """Two groups of 2 and 6 tokens: 6 steps of 4 slots, 16 tokens."""
    result = generation("plain", short_and_long)
    assert result == Generation(0.0, 6.0, 16.0, 1.0, 0.0, pytest.approx(1 / 3), 0.0)
    assert generation("sorted", short_and_long) == result  # all of them run at once


def test_partial_goes_on_in_the_next_steps() -> None:
    """With 2 tokens a step, a step has two new groups of two responses and the long responses of
    two earlier steps: 2 steps of 8 slots, all full. A group's last step samples 2 of its 8 tokens.
    """
    result = generation("partial", short_and_long, budget=2)
    assert result == Generation(0.0, 2.0, 16.0, 1.0, 0.0, 0.0, 0.75)


def test_a_response_that_would_be_too_old_runs_to_its_end() -> None:
    """Groups that are two updates old are due: 2 tokens in each of two steps, then the last 4."""
    result = generation("partial", lambda rng, n: np.full(n, 8), budget=2, max_staleness=2)
    assert (result.seconds, result.tokens) == (4.0, 32.0)
    assert result.slots_idle == pytest.approx(1 - 32 / 48)  # 4 steps, 12 responses


def test_more_rounds_refill_a_batch_that_waits() -> None:
    """Refilling begins more groups in a second round, which takes its time as well."""
    one = generation("partial", lognormal(3, 1), budget=2, generation_rounds=1)
    more = generation("partial", lognormal(3, 1), budget=2, generation_rounds=4)
    assert one.rounds <= 1.0  # enough groups may wait for a step without a round
    assert more.rounds > 1.0
    assert more.seconds > one.seconds


def test_the_limit_cuts_and_the_figures_repeat() -> None:
    result = generation("plain", lognormal(1000, 0.1))
    assert (result.seconds, result.tokens) == (8.0, 32.0)
    for side in SIDES:
        budget = 2 if side == "partial" else None
        twice = [generation(side, lognormal(3, 1), budget=budget) for _ in range(2)]
        assert twice[0] == twice[1]


def test_lognormal_lengths() -> None:
    drawn = lognormal(100, 0.5)(np.random.default_rng(1), 100_000)
    assert np.median(drawn) == pytest.approx(100, rel=0.01)
    assert np.log(drawn).std() == pytest.approx(0.5, rel=0.01)
    # The mean of a log-normal distribution is its median times exp(sigma^2 / 2).
    assert mean_tokens(lognormal(2000, 1), 10**9) == pytest.approx(2000 * math.exp(0.5), rel=0.02)
    assert mean_tokens(lognormal(2000, 0), 1500) == 1500


def test_responses_to_one_prompt_stay_together() -> None:
    draw, rng = logged([[5, 5], [7]]), np.random.default_rng(1)
    groups = {tuple(draw(rng, 3).tolist()) for _ in range(50)}
    assert groups == {(5, 5, 5), (7, 7, 7)}


def test_a_runs_own_lengths(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    for step, uid in enumerate("aab"):
        file = tmp_path / "rollouts" / f"step_{step:06d}.jsonl"
        records = [{"uid": uid, "num_tokens": 10 * step + k} for k in (1, 2)]
        text = "\n".join(map(json.dumps, records))
        file.write_text(text + '\n{"uid": "a", "num_tok')  # the run is writing
    drawn = read_lengths(str(tmp_path))(np.random.default_rng(1), 1000)
    assert set(drawn.tolist()) in ({1, 2}, {11, 12}, {21, 22})
    rng = np.random.default_rng(1)
    assert set(np.concatenate([read_lengths(str(file))(rng, 50) for _ in range(9)])) == {21, 22}


@pytest.mark.parametrize("spec", ["normal", "lognormal:", "lognormal:2000", "lognormal:a,b", "."])
def test_what_names_no_lengths_is_an_error(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--lengths {spec} is neither lognormal, nor"):
        read_lengths(spec)


def test_a_record_without_lengths_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "response_length/mean": 12.0}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl is neither lognormal"):
        read_lengths(str(tmp_path / "metrics.jsonl"))
