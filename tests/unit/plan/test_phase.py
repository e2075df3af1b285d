"""Plans of phases: rows, the engine's share, what does not fit, and the change that mends it."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_qlrl.config.schema import Config
from megatron_qlrl.plan.advise import fastest, smallest_change
from megatron_qlrl.plan.estimate import Lengths, cache_bytes
from megatron_qlrl.plan.hardware import GIB, HARDWARE
from megatron_qlrl.plan.phase import Cluster, PhasePlan, longest_row, plan_phase
from tests.unit.plan.test_memory import qwen

QWEN14 = qwen(5120, 48, 40, 8, 13_824)
H100S = Cluster(32, HARDWARE["h100-80g"])


def config(limit: int = 60_000, **sections: Any) -> Config:
    phases = [{"name": "p", "max_input_tokens": limit, "steps": 10}]
    return Config.model_validate({"model": {"path": "x"}, "phases": phases} | sections)


def plan(cluster: Cluster = H100S, **sections: Any) -> PhasePlan:
    return plan_phase(config(**sections), QWEN14, cluster)


@pytest.mark.parametrize(
    ("limits", "tokens", "group", "responses"),
    [
        ([20_000], 30_000, (8, 10_000), 29_999),  # any prompt may be short
        ([20_000], 30_000, (2, 1_000), 29_985),  # 15 prompts of one token
        ([20_000, 60_000], 70_000, (8, 10_000), 49_999),  # one prompt of 20,001
        ([20_000, 60_000], 70_000, (4, 1_000), 9_997),  # three of them: 70,000 - 3 x 20,001
    ],
)
def test_rows_have_as_many_response_tokens_as_the_phase_allows(
    limits: list[int], tokens: int, group: tuple[int, int], responses: int
) -> None:
    phases = [{"name": str(n), "max_input_tokens": n, "steps": 1} for n in limits]
    found = Config.model_validate(
        {
            "model": {"path": "x"},
            "phases": phases,
            "policy": {"max_tokens_per_row": tokens},
            "rollout": {"group_size": group[0], "max_response_tokens": group[1]},
        }
    )
    assert longest_row(found).responses == responses


def test_what_does_not_fit_is_named_with_figures() -> None:
    found = plan()
    assert found.dp == 32
    assert len(found.problems) == 2
    assert found.problems[0].startswith("the update needs ")
    assert found.problems[0].endswith(" GiB of 79.1 GiB (at: log-probs backward)")
    # weights 2 bytes, Adam 12 / 32, of 14.77 B; context and NCCL; 60 % of the GPU
    rollout = 14_770_033_664 * (2 + 12 / 32) + 3 * GIB + 0.6 * 79.1 * GIB
    assert found.problems[1] == (
        f"the rollout needs {rollout / GIB:.1f} GiB of 79.1 GiB (at: generating)"
    )


def test_cache_must_hold_the_longest_sequence() -> None:
    layout = {"tp": 8, "cp": 2}
    # 30 % of 79.1 GiB less 4 GiB and the 27.5 GiB of weights: nothing is left.
    none = plan(policy=layout, rollout={"gpu_memory_utilization": 0.3})
    assert none.problems[-1] == (
        "the engine's cache holds 0 tokens, and the longest prompt with its response is 70,000"
    )
    # tp 2: 2 x (31.64 - 4) GiB less 27.51 GiB of weights; a token takes 2 * 48 * 8 * 128 * 2 bytes
    some = plan(policy=layout, rollout={"gpu_memory_utilization": 0.4, "tp": 2})
    assert cache_bytes(QWEN14, 2) == 196_608
    room = 2 * (0.4 * 79.1 - 4) * GIB - 2 * 14_770_033_664
    assert some.cache_tokens == pytest.approx(room / 196_608)
    assert some.problems == ()


def test_what_waits_in_host_memory() -> None:
    each = 14_770_033_664 / 8  # parameters of a rank; 8 ranks in a node, 4 nodes
    # The weights, and each rank's share of Adam's 12 bytes among 4 data parallel ranks.
    checkpoint = {"checkpoint": 8 * (2 + 12 / 4) * each}
    assert plan(policy={"tp": 8}).host == pytest.approx(
        {"reference": 8 * 2 * each} | checkpoint, rel=1e-3
    )
    assert plan(policy={"tp": 8}, algorithm={"reference": False}).host == pytest.approx(
        checkpoint, rel=1e-3
    )
    # Two data parallel ranks of a stage share a node: half of its ranks write weights.
    halves = plan(policy={"tp": 4, "pp": 1}, algorithm={"reference": False})
    assert halves.host == pytest.approx({"checkpoint": (4 * 2 + 8 * 12 / 8) * 2 * each}, rel=1e-3)
    # Four stages of two ranks in a node, the last with the LM head; every rank writes 2 + 12 bytes.
    stages = plan(
        policy={"tp": 2, "pp": 16, "distributed_optimizer": False}, algorithm={"reference": False}
    )
    vocab = 152_064 * 5120
    last = (3 * (14_770_033_664 - 2 * vocab) / 48 + vocab) / 2
    assert stages.host == pytest.approx({"checkpoint": 8 * 14 * last}, rel=1e-3)
    before = plan(policy={"tp": 8, "recompute": "full"})
    after = plan(
        policy={"tp": 8, "recompute": "full", "offload_activations": True},
        optimizer={"offload": True},
    )
    # Adam over 4 data parallel ranks; 48 inputs of 72,000 / 8 tokens x 5120 x 2 bytes
    # (92 MB), which pinned memory holds in 88 MiB.
    moved = {"optimizer": 8 * 12 * each / 4, "layer inputs": 8 * 48 * 88 * 2**20}
    assert after.host == pytest.approx(dict(before.host) | moved, rel=1e-3)
    assert after.rollout is not None and before.rollout is not None
    gone = before.rollout.total - after.rollout.total
    assert gone == pytest.approx(12 * each / 4, rel=1e-3)


def test_sft_has_no_rollout() -> None:
    found = plan_phase(
        Config.model_validate({"model": {"path": "x"}, "policy": {"tp": 8, "cp": 2}}),
        QWEN14,
        H100S,
    )
    assert (found.name, found.rollout, found.seconds, found.problems) == ("sft", None, {}, ())


def test_smallest_change_is_one_setting_where_one_is_enough() -> None:
    before = config(20_000, policy={"max_tokens_per_row": 32_000})
    option = smallest_change(before, QWEN14, H100S, None)
    assert option is not None
    assert option.changes == {"policy.tp": 8}
    assert option.plan.problems == ()


@pytest.mark.parametrize(
    ("room", "policy", "change"),
    [
        # Weights 3.4, gradients 6.9, Adam 20.6 GiB, and activations beside all but the last.
        (40, {"tp": 8, "distributed_optimizer": False, "recompute": "full"}, "optimizer.offload"),
        (24, {"tp": 4, "pp": 4, "recompute": "full"}, "policy.offload_activations"),
    ],
)
def test_host_memory_may_be_the_smallest_change(
    room: float, policy: dict[str, Any], change: str
) -> None:
    small = Cluster(32, replace(HARDWARE["h100-80g"], memory_bytes=room * GIB))
    sft = Config.model_validate({"model": {"path": "x"}, "policy": policy})
    assert plan_phase(sft, QWEN14, small).problems
    option = smallest_change(sft, QWEN14, small, None)
    assert option is not None
    assert option.changes == {change: True}


def test_an_engine_that_is_too_large_gets_a_smaller_share() -> None:
    before = config(policy={"tp": 8, "cp": 2}, rollout={"gpu_memory_utilization": 0.95})
    option = smallest_change(before, QWEN14, H100S, None)
    assert option is not None
    assert list(option.changes) == ["rollout.gpu_memory_utilization"]
    share = option.changes["rollout.gpu_memory_utilization"]
    assert not plan(policy={"tp": 8, "cp": 2}, rollout={"gpu_memory_utilization": share}).problems
    more = {"gpu_memory_utilization": share + 0.05}
    assert plan(policy={"tp": 8, "cp": 2}, rollout=more).problems


def test_nothing_fits_a_gpu_that_is_too_small() -> None:
    small = Cluster(8, replace(HARDWARE["h100-80g"], memory_bytes=16 * GIB))
    assert smallest_change(config(), QWEN14, small, None) is None


def test_fastest_layouts_fit_and_are_in_order() -> None:
    found = fastest(config(), QWEN14, H100S, Lengths(30_000, 3_000), count=4)
    assert len(found) == 4
    assert [o.seconds for o in found] == sorted(o.seconds for o in found)
    for option in found:
        assert option.plan.problems == ()
        policy = option.plan.config.policy
        assert 32 % (policy.tp * policy.pp * policy.cp) == 0
        assert policy.tp <= 8  # inside a node
