"""The stability rules, one at a time; limits worked out by hand."""

import json
import math
from typing import Any

import pytest

from megatron_qlrl.config.schema import StabilityConfig
from megatron_qlrl.metrics.monitor import RULES, Monitor

GOOD = {"actor/pg_loss": 0.1, "actor/entropy": 0.5, "actor/kl_loss": 0.04, "actor/grad_norm": 2.0}
REWARD = {"critic/rewards/mean": 0.4}


def make_monitor(**settings: Any) -> tuple[Monitor, list[str]]:
    said: list[str] = []
    return Monitor(StabilityConfig.model_validate({"window": 3} | settings), warn=said.append), said


def run_step(monitor: Monitor, step: int, *updates: dict[str, float], reward=REWARD, phase=0):
    monitor.begin(step, phase, reward)
    permitted = [monitor.permit(GOOD | update) for update in updates]
    return permitted, monitor.end()


def settled(**settings: Any) -> tuple[Monitor, list[str]]:
    """After three good steps of one update, so that medians are known."""
    monitor, said = make_monitor(**settings)
    for step in range(3):
        assert run_step(monitor, step, {})[0] == [True]
    assert said == []
    return monitor, said


# kl: 10 x 0.04 = 0.4; gradient: 10 x 2; entropy: 0.01.
BAD = {
    "kl_spike": ({"actor/kl_loss": 0.41}, {"actor/kl_loss": 0.4}),
    "gradient_spike": ({"actor/grad_norm": 20.1}, {"actor/grad_norm": 20.0}),
    "entropy_floor": ({"actor/entropy": 0.0099}, {"actor/entropy": 0.01}),
    "non_finite": ({"actor/grad_norm": math.nan}, {"actor/grad_norm": 3.0}),
}


@pytest.mark.parametrize("rule", BAD)
@pytest.mark.parametrize("action", ["skip", "stop", "roll_back"])
def test_a_rule_acts_within_the_step_and_not_at_its_limit(rule: str, action: str) -> None:
    bad, good = BAD[rule]
    monitor, said = settled(**{rule: action})
    assert run_step(monitor, 3, good)[0] == [True]
    assert monitor.demand is None and said == []
    permitted, counts = run_step(monitor, 4, {}, bad, {})
    # a skipped update is one update; after a demand nothing more is trained in the step
    assert permitted == [True, False, action == "skip"]
    assert counts[f"stability/{rule}"] == 1
    assert counts["stability/skipped"] == (1 if action == "skip" else 2)
    assert sum(counts[f"stability/{other}"] for other in RULES) == 1
    assert monitor.demand == (None if action == "skip" else action)
    assert len(said) == 1
    assert said[0].startswith(f"step 4: {rule} ({action}): actor/")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["actor/pg_loss", "actor/grad_norm", "sft/nll"])
def test_non_finite_is_skipped_from_the_first_update_on(name: str, value: float) -> None:
    monitor, _ = make_monitor()
    permitted, counts = run_step(monitor, 0, {name: value})
    assert permitted == [False]
    assert counts["stability/non_finite"] == counts["stability/skipped"] == 1


@pytest.mark.parametrize("rule", ["kl_spike", "gradient_spike", "entropy_floor"])
def test_warnings_let_the_update_through_and_are_said_once(rule: str) -> None:
    bad, _ = BAD[rule]
    monitor, said = settled(window=3)
    assert run_step(monitor, 3, bad, bad)[0] == [True, True]
    assert len(said) == 1 and monitor.demand is None
    assert run_step(monitor, 4, {})[1][f"stability/{rule}"] == 0
    for step in (5, 6, 7):  # back to the medians
        run_step(monitor, step, {})
    assert len(said) == 1
    run_step(monitor, 8, bad)
    assert len(said) == 2  # it was silent in between
    quiet, said = settled(**{rule: "ignore"})
    assert run_step(quiet, 3, bad)[1][f"stability/{rule}"] == 0
    assert said == []


def test_reward_collapse_denies_all_updates_of_the_step() -> None:
    monitor, said = settled(reward_collapse="skip")  # 0.25 x 0.4 = 0.1
    assert run_step(monitor, 3, {}, reward={"critic/rewards/mean": 0.1})[0] == [True]
    permitted, counts = run_step(monitor, 4, {}, {}, reward={"critic/rewards/mean": 0.09})
    assert permitted == [False, False]
    assert counts["stability/reward_collapse"] == 1
    assert "critic/rewards/mean 0.09 is below 0.25 x its median 0.4" in said[0]


@pytest.mark.parametrize("action", ["stop", "roll_back"])
def test_reward_collapse_is_seen_without_any_update(action: str) -> None:
    monitor, _ = settled(reward_collapse=action)
    run_step(monitor, 3, reward={"critic/rewards/mean": 0.0})
    assert monitor.demand == action


@pytest.mark.parametrize("reward", [{}, {"critic/rewards/mean": math.nan}])
def test_a_step_without_rewards_is_not_a_collapse(reward: dict[str, float]) -> None:
    monitor, said = settled(reward_collapse="stop")
    assert run_step(monitor, 3, {}, reward=reward)[0] == [True]
    assert monitor.demand is None and said == []


def test_nothing_is_compared_before_the_window_is_full_or_over_a_phase_boundary() -> None:
    monitor, said = make_monitor(kl_spike="stop", gradient_spike="stop", reward_collapse="stop")
    wild = {"actor/kl_loss": 9.0, "actor/grad_norm": 900.0}
    for step in range(2):
        run_step(monitor, step, {})
    assert run_step(monitor, 2, wild)[0] == [True]
    monitor, said = settled(kl_spike="stop", gradient_spike="stop", reward_collapse="stop")
    assert run_step(monitor, 3, wild, reward={"critic/rewards/mean": 0.0}, phase=1)[0] == [True]
    assert said == []


def test_kl_near_zero_is_no_spike() -> None:
    monitor, _ = make_monitor(kl_spike="skip")
    for step in range(3):
        run_step(monitor, step, {"actor/kl_loss": 1e-6})
    assert run_step(monitor, 3, {"actor/kl_loss": 0.1})[0] == [True]
    assert run_step(monitor, 4, {"actor/kl_loss": 0.11})[0] == [False]


def test_too_many_skips_in_a_row_stop_the_run() -> None:
    monitor, _ = make_monitor(max_skips=2)
    nan = {"actor/grad_norm": math.nan}
    assert run_step(monitor, 0, nan, nan, {}, nan, nan)[0] == [False, False, True, False, False]
    assert monitor.demand is None
    run_step(monitor, 1, nan)
    assert monitor.demand == "stop"
    assert monitor.reason == "step 1: 3 updates skipped in a row"


def test_roll_backs_are_bounded() -> None:
    monitor, _ = make_monitor(non_finite="roll_back", max_roll_backs=1)
    nan = {"actor/grad_norm": math.nan}
    run_step(monitor, 0, nan)
    assert monitor.demand == "roll_back"
    monitor.rolled_back()
    run_step(monitor, 1, {})
    assert monitor.demand is None
    _, counts = run_step(monitor, 2, nan)
    assert monitor.demand == "stop"
    assert "non_finite: actor/grad_norm is nan; rolled back 1 times already" in monitor.reason
    assert counts["stability/roll_backs"] == 1


def test_values_of_skipped_updates_do_not_move_the_median() -> None:
    monitor, _ = settled(gradient_spike="skip", max_skips=99)
    for step in range(3, 9):
        assert run_step(monitor, step, {"actor/grad_norm": 30.0})[0] == [False]


def test_a_resumed_monitor_decides_the_same() -> None:
    monitor, _ = settled(gradient_spike="skip", max_roll_backs=1, non_finite="roll_back")
    run_step(monitor, 3, {"actor/grad_norm": math.nan})
    monitor.rolled_back()
    resumed, _ = make_monitor(gradient_spike="skip", max_roll_backs=1, non_finite="roll_back")
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert run_step(resumed, 4, {"actor/grad_norm": 20.1})[0] == [False]
    run_step(resumed, 5, {"actor/grad_norm": math.nan})
    assert resumed.demand == "stop"
    fresh, _ = make_monitor(gradient_spike="skip")
    assert run_step(fresh, 4, {"actor/grad_norm": 20.1})[0] == [True]
