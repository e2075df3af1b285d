"""Step times against sums written out by hand, at rates of round numbers."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_qlrl.config.schema import Config
from megatron_qlrl.plan.estimate import (
    Lengths,
    generation_seconds,
    make_engine,
    training_seconds,
    training_work,
)
from megatron_qlrl.plan.flops import block_flops, prefill_flops
from megatron_qlrl.plan.hardware import HARDWARE
from tests.unit.plan.test_memory import TINY

ROUND = replace(
    HARDWARE["h100-80g"],
    bf16_flops=1e6,
    fp8_flops=4e6,
    training_efficiency=0.5,
    fp8_efficiency=0.25,
    prefill_efficiency=0.5,
    bandwidth=1e4,
    decode_efficiency=0.5,
    decode_step_s=1.0,
    nvlink=1e3,
    network=100.0,
    link_efficiency=0.5,
    host_copy=1e3,
    pinned_copy=200.0,
)
LENGTHS = Lengths(prompt=20, response=4)


def config(**sections: Any) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": "x"},
        "phases": [{"name": "p", "max_input_tokens": 20, "steps": 1}],
        "rollout": {"prompts_per_step": 8, "group_size": 4, "max_response_tokens": 4},
        "policy": {"max_tokens_per_row": 36},
        "algorithm": {"reference": False},
    }
    for name, settings in sections.items():
        tree[name] = tree.get(name, {}) | settings
    return Config.model_validate(tree)


def test_prompts_are_computed_once_for_each_row() -> None:
    work = training_work(config(), TINY, gpus=1, lengths=LENGTHS)
    assert work.tokens == 8 * 36
    assert work.forward == 8 * block_flops(TINY, 20, [4] * 4)
    assert work.separate == 8 * 4 * block_flops(TINY, 20, [4])
    # Two responses fit beside the prompt: two rows a group.
    split = training_work(config(policy={"max_tokens_per_row": 28}), TINY, gpus=1, lengths=LENGTHS)
    assert split.forward == 8 * 2 * block_flops(TINY, 20, [4] * 2)
    alone = training_work(config(policy={"share_prompts": False}), TINY, gpus=1, lengths=LENGTHS)
    assert alone.forward == alone.separate == work.separate


def test_updates_execute_the_logits_once_more_and_what_is_recomputed() -> None:
    head = 8 * 16 * 2 * 8 * 16  # tokens x 2 x hidden x vocabulary
    linear = 2 * 288 * 2 * (8 * 8 + 8 * 8 + 2 * 8 * 4 + 3 * 8 * 10)  # q, proj, k and v, MLP
    found = {
        mode: training_work(config(policy={"recompute": mode}), TINY, gpus=1, lengths=LENGTHS)
        for mode in ("none", "selective", "full")
    }
    forward = found["none"].forward
    assert found["none"].linear == linear
    assert found["none"].update == 3 * forward + head
    assert found["full"].update == 4 * forward
    mlp = 2 * 288 * 2 * 3 * 8 * 10
    assert found["selective"].update == 3 * forward + head + mlp


def test_pipelines_and_missing_rows_idle() -> None:
    # 8 rows of 36 tokens on 2 data parallel ranks of 2 stages: 4 micro-batches, one bubble.
    work = training_work(config(policy={"pp": 2}), TINY, gpus=4, lengths=LENGTHS)
    assert work.idle == 5 / 4
    # on 16 ranks one each, and half of the ranks have none
    assert training_work(config(), TINY, gpus=16, lengths=LENGTHS).idle == 2


def seconds(gpus: int = 1, **sections: Any) -> dict[str, float]:
    chosen = config(**sections)
    work = training_work(chosen, TINY, gpus=gpus, lengths=LENGTHS)
    return training_seconds(
        chosen, TINY, work, gpus=gpus, hardware=ROUND, width=2, weight_bytes=2_000
    )


def test_training_time() -> None:
    work = training_work(config(), TINY, gpus=1, lengths=LENGTHS)
    assert seconds() == {"updates": pytest.approx(work.update / 5e5)}
    more = seconds(algorithm={"reference": True, "updates_per_step": 2})
    # the first of two mini-batches needs none
    assert more["old log-probs"] == pytest.approx(work.forward / 5e5 / 2)
    # the reference's weights in and out, both ways: 4 x 2,000 bytes at 1,000 a second
    assert more["reference"] == pytest.approx(work.forward / 5e5 + 8)
    rare = seconds(algorithm={"reference": True, "reference_every": 10})
    assert rare["reference"] == pytest.approx(more["reference"] / 10)


def test_fp8_counts_for_linear_layers_alone() -> None:
    work = training_work(config(), TINY, gpus=1, lengths=LENGTHS)
    plain, fast = work.linear / work.forward, work.linear / work.forward / 2
    found = seconds(policy={"fp8": "hybrid"})["updates"]
    assert found == pytest.approx(work.update * (1 - plain + fast) / 5e5)


def test_links_take_time_beside_the_products() -> None:
    work = training_work(config(policy={"tp": 2}), replace(TINY, num_kv_heads=2), gpus=2,
                         lengths=LENGTHS)  # fmt: skip
    chosen = config(policy={"tp": 2})
    shape = replace(TINY, num_kv_heads=2)
    found = training_seconds(
        chosen, shape, work, gpus=2, hardware=ROUND, width=2, weight_bytes=2_000
    )
    # 288 tokens, 2 layers, 4 collectives of half of 8 x 2 bytes, 2.5 times with the backward pass
    links = 288 * 2 * 4 * 8 * 2.5 / 500
    assert found["updates"] == pytest.approx(work.update / 2 / 5e5 + links)


@pytest.mark.parametrize(("mode", "times"), [("none", 2.5), ("selective", 3), ("full", 3.5)])
def test_recomputation_repeats_collectives(mode: str, times: float) -> None:
    shape = replace(TINY, num_kv_heads=2)
    chosen = config(policy={"tp": 2, "recompute": mode})
    work = training_work(chosen, shape, gpus=2, lengths=LENGTHS)
    found = training_seconds(
        chosen, shape, work, gpus=2, hardware=ROUND, width=2, weight_bytes=2_000
    )
    links = 288 * 2 * 4 * 8 * times / 500
    assert found["updates"] == pytest.approx(work.update / 2 / 5e5 + links)


def test_copies_to_host_memory_and_back() -> None:
    full = {"recompute": "full"}
    plain = seconds(policy=full)["updates"]
    # 288 tokens, 2 layers, 8 x 2 bytes, out and in at 200 a second
    moved = seconds(policy=full | {"offload_activations": True})["updates"]
    assert moved == pytest.approx(plain + 2 * 288 * 2 * 16 / 200)
    # 1,000 parameters of 12 bytes, out and in at 1,000 a second, in each of two updates
    two: dict[str, Any] = {"algorithm": {"updates_per_step": 2}}
    stepped = seconds(**two, optimizer={"offload": True})["updates"]
    assert stepped == pytest.approx(seconds(**two)["updates"] + 2 * 2 * 12)
    # On two ranks the distributed optimizer has half of it on each.
    shared = seconds(2, optimizer={"offload": True})["updates"]
    assert shared == pytest.approx(seconds(2)["updates"] + 2 * 6)


def test_gradients_are_reduced_over_data_parallel_ranks() -> None:
    work = training_work(config(), TINY, gpus=2, lengths=LENGTHS)
    # 1,000 parameters: 4 bytes of gradient, 2 of weight, inside the node
    assert seconds(gpus=2)["updates"] == pytest.approx(work.update / 2 / 5e5 + 6_000 / 500)


def test_generation_time() -> None:
    engine = make_engine(
        config(), TINY, hardware=ROUND, lengths=LENGTHS, cache_tokens=72, width=2,
        weight_bytes=2_000,
    )  # fmt: skip
    found = generation_seconds(
        config(), engine, gpus=1, hardware=ROUND, lengths=LENGTHS, weight_bytes=2_000
    )
    assert found["weight stream"] == 20
    assert found["prompts"] == pytest.approx(8 * prefill_flops(TINY, 20) / 5e5)
    # A response takes 4 tokens and a quarter of the prompt's 20: 8 of the 32 fit at one time.
    # Each of 4 tokens reads 2,000 bytes of weights and 8 x 22 tokens of 2 * 2 * 4 * 2 = 32 bytes.
    step = (2_000 + 8 * 22 * 32) / 5_000 + 1
    assert found["generation"] == pytest.approx(4 * 4 * step)
