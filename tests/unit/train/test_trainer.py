"""One optimizer batch: what is asked of the policy, in which order."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_policy import FakePolicy, make_trainer

from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.policy.entropy_control import EntropyControl
from megatron_qlrl.train.trainer import split_updates
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup, TrainGroup, TrainResponse

pytestmark = pytest.mark.usefixtures("lone_group")


def batch_of(num: int) -> list[TrainGroup]:
    """Groups of a prompt of one token and a response of two."""
    response = TrainResponse(np.zeros(2, np.int32), 1.0)
    return [TrainGroup(np.array([i], np.int32), (response,)) for i in range(num)]


def train(groups: Sequence[TrainGroup], step: int, **settings: Any) -> tuple[FakePolicy, Meter]:
    policy, meter = FakePolicy(), Meter()
    make_trainer(policy, **settings).update(groups, step=step, meter=meter)
    return policy, meter


def test_logprobs_are_taken_before_the_first_update_which_needs_no_old_ones() -> None:
    policy, meter = train(batch_of(5), 4, updates_per_step=2, use_reference=True)
    assert policy.calls == [
        "reference weights",
        ("ref_logprobs", 2),
        ("ref_logprobs", 3),
        "own weights",
        ("old_logprobs", 3),
        ("update", 8, ["ref_logprobs"]),
        ("update", 9, ["old_logprobs", "ref_logprobs"]),
    ]
    metrics = meter.summary()
    assert metrics["actor/pg_loss"] == 8.5
    timed = {"adv", "ref", "old_log_prob", "update_actor"}
    assert {f"timing_s/{name}" for name in timed} <= metrics.keys()


def test_masking_begins_after_an_update_of_high_entropy_and_resumes() -> None:
    """Entropies of the updates are 0, 1, 2, ...; the band is 0.5 to 1.5."""
    control, policy = EntropyControl((0.5, 1.5)), FakePolicy()
    trainer, meter = make_trainer(policy, updates_per_step=4, entropy_control=control), Meter()
    bad = TrainResponse(np.zeros(2, np.int32), -1.0)
    groups = [replace(group, responses=(bad,)) for group in batch_of(4)]
    trainer.update(groups, step=0, meter=meter)
    assert [row.columns["advantages"][0] for row in policy.trained] == [-1, -1, -1, 0]
    assert meter.summary()["actor/aepo_masking"] == 0.25
    resumed = make_trainer(FakePolicy(), entropy_control=EntropyControl((0.5, 1.5)))
    resumed.load_state_dict(json.loads(json.dumps(trainer.state_dict())))
    assert resumed.state_dict() == trainer.state_dict() == {"masking": True}
    # Checkpoints of before have no such state, and runs without a band need none.
    resumed.load_state_dict({})
    assert resumed.state_dict() == {"masking": False}
    assert make_trainer(FakePolicy()).state_dict() == {}


def test_one_update_needs_no_old_logprobs() -> None:
    policy, meter = train(batch_of(5), 0)
    assert policy.calls == [("update", 0, [])]
    assert not {"timing_s/ref", "timing_s/old_log_prob"} & meter.summary().keys()


@pytest.mark.parametrize(("step", "computed"), [(0, True), (1, False), (2, False), (3, True)])
def test_reference_is_computed_every_few_steps(step: int, computed: bool) -> None:
    policy, meter = train(batch_of(2), step, use_reference=True, reference_every=3)
    columns = ["ref_logprobs"] if computed else []
    assert policy.calls[-1] == ("update", step, columns)
    assert ("timing_s/ref" in meter.summary()) is computed


def test_one_group_left_for_two_updates_is_one_update() -> None:
    policy, _ = train(batch_of(1), 2, updates_per_step=2, use_reference=True)
    assert policy.calls[-1] == ("update", 4, ["ref_logprobs"])
    assert sum(call[0] == "update" for call in policy.calls) == 1


def test_empty_batch_is_no_update() -> None:
    policy, meter = train([], 0, updates_per_step=2)
    assert policy.calls == []
    assert "perf/tflops/actor" not in meter.summary()


@pytest.mark.parametrize(
    ("groups", "updates", "want"), [(7, 3, [2, 2, 3]), (2, 4, [1, 1]), (0, 2, []), (4, 1, [4])]
)
def test_mini_batches_are_whole_groups_in_order(groups: int, updates: int, want: list[int]) -> None:
    batch = batch_of(groups)
    shares = split_updates(batch, updates)
    assert [len(share) for share in shares] == want
    assert [group for share in shares for group in share] == batch


def test_speed_counts_the_flops_of_all_rows_and_every_token_once() -> None:
    """The toy model: 4 layers, hidden 64, 4 query and 2 key heads of 16, MLP 128, vocabulary V."""
    policy, meter = train(batch_of(3), 0)
    shape, seconds = policy.model_shape, meter.seconds("update_actor")
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    linear = 2 * shape.hidden_size * (q + 2 * kv + q + 3 * shape.ffn_size)
    # Three tokens; the prompt sees itself, the response itself (3 pairs) and the prompt (2).
    layers = shape.num_layers * (3 * linear + 6 * 4 * q)
    forward = layers + 2 * 2 * shape.hidden_size * shape.vocab_size
    metrics = meter.summary()
    assert metrics["perf/tflops/actor"] * seconds == pytest.approx(3 * 3 * forward / 1e12)
    assert metrics["perf/train_tokens_per_s"] * seconds == pytest.approx(9)
    assert "perf/mfu/actor" not in metrics  # nobody knows this machine's peak


def scored(uid: str, *values: float | None) -> ScoredGroup:
    """Response k has k + 1 tokens."""
    prompt = Prompt(uid, np.arange(3, dtype=np.int32), "docqa", "?", "!")
    rollouts = tuple(
        Rollout(uid, k, np.full(k + 1, k, np.int32), np.zeros(k + 1, np.float32), "", True, 0)
        for k in range(len(values))
    )
    return ScoredGroup(prompt, rollouts, tuple(Score(v, v or 0.0) for v in values))


def test_groups_that_wait_keep_the_logprobs_of_the_weights_that_sampled_them() -> None:
    policy, meter = FakePolicy(), Meter()
    policy.version = 2
    trainer = make_trainer(policy)
    early = replace(scored("a", 1.0, 0.0), old_logprobs=(np.zeros(1), np.zeros(2)))
    groups = [scored("b", 1.0, None), early, scored("c", 0.0, 1.0, 0.0)]
    held = trainer.with_old_logprobs(groups, meter)
    assert held[1] is early
    assert policy.calls == [("old_logprobs", 2)]
    for group, lengths in ((held[0], [1, 2]), (held[2], [1, 2, 3])):
        assert group.old_logprobs is not None
        assert [old.tolist() for old in group.old_logprobs] == [[-3.0] * n for n in lengths]
    policy.calls.clear()
    assert trainer.with_old_logprobs([], meter) == []
    assert policy.calls == []


def test_only_the_tokens_of_the_present_weights_get_logprobs_before_waiting() -> None:
    policy, meter = FakePolicy(), Meter()
    policy.version = 2
    old = (np.array([-0.5], np.float32), np.array([-0.25, np.nan], np.float32))
    (held,) = make_trainer(policy).with_old_logprobs(
        [replace(scored("a", 1.0, 0.0), old_logprobs=old)], meter
    )
    assert held.old_logprobs is not None
    assert [values.tolist() for values in held.old_logprobs] == [[-0.5], [-0.25, -3.0]]


def test_the_old_policy_of_a_group_is_the_one_that_sampled_it() -> None:
    known = np.array([-0.25, -0.5], np.float32)
    waited = TrainGroup(
        np.zeros(1, np.int32), (TrainResponse(np.zeros(2, np.int32), 1.0, None, known),)
    )
    fresh = TrainGroup(np.zeros(1, np.int32), (TrainResponse(np.zeros(3, np.int32), -1.0),))
    batch = [waited, fresh]
    policy, _ = train([*batch, *batch], 0, updates_per_step=2)
    update = ("update", 0, ["old_logprobs"])
    assert policy.calls == [("old_logprobs", 2), update, ("update", 1, ["old_logprobs"])]
    first, second = (
        {group: row.columns["old_logprobs"][place].tolist() for group, _, place in row.slices()}
        for row in policy.trained
    )
    # The loss fills in the first mini-batch's: those of its own forward pass.
    assert first[0] == [-0.25, -0.5]
    assert len(first[1]) == 3
    assert np.isnan(first[1]).all()
    assert second == {0: [-0.25, -0.5], 1: [-1.0] * 3}
