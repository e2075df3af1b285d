import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_qlrl.curriculum.waiting import decode_group, encode_group
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup

PROMPT = Prompt("f:3", np.arange(4, dtype=np.int32), "s", "q", "a")


def make_group(old=np.float32):
    rng = np.random.default_rng(0)
    rollouts = tuple(
        Rollout(
            "f:3",
            k,
            rng.integers(0, 2**31 - 1, n).astype(np.int32),
            rng.normal(size=n).astype(np.float32),
            'été "\n',
            k == 1,
            7,
        )
        for k, n in enumerate((5, 0, 3))
    )
    scores = (Score(1.0, 0.0, "boxed", "x"), Score(None, 0.0), Score(1 / 3, 1 / 3))
    return ScoredGroup(
        PROMPT, rollouts, scores, tuple(rng.normal(size=n).astype(old) for n in (5, 0, 3))
    )


def test_every_bit_comes_back_through_json():
    group = make_group()
    got = decode_group(json.loads(json.dumps(encode_group(group))), {"f:3": PROMPT})
    assert got.prompt is PROMPT
    assert got.scores == group.scores
    assert got.old_logprobs is not None and group.old_logprobs is not None
    for mine, theirs in zip(got.rollouts, group.rollouts, strict=True):
        for name in ("token_ids", "engine_logprobs"):
            here, there = getattr(mine, name), getattr(theirs, name)
            assert here.dtype == there.dtype
            assert here.tobytes() == there.tobytes()
        plain = [
            (r.prompt_uid, r.sample, r.text, r.finished, r.weight_version) for r in (mine, theirs)
        ]
        assert plain[0] == plain[1]
    for here, there in zip(got.old_logprobs, group.old_logprobs, strict=True):
        assert (here.dtype, here.tobytes()) == (there.dtype, there.tobytes())


def test_another_number_type_is_never_rounded():
    with pytest.raises(AssertionError):
        encode_group(make_group(old=np.float64))


def test_a_group_with_a_response_that_goes_on_comes_back():
    group = make_group()
    going = replace(
        group.rollouts[2], versions=np.array([7, 8, 8], np.int32), finished=False, goes_on=True
    )
    group = replace(group, rollouts=(*group.rollouts[:2], going))
    got = decode_group(json.loads(json.dumps(encode_group(group))), {"f:3": PROMPT})
    assert not got.whole
    assert [r.goes_on for r in got.rollouts] == [False, False, True]
    assert [r.token_versions.tolist() for r in got.rollouts] == [[7] * 5, [], [7, 8, 8]]
    assert got.rollouts[2].versions is not None and got.rollouts[2].versions.dtype == np.int32


def test_groups_of_checkpoints_before_partial_rollouts_are_read():
    saved = {
        "uid": "f:3",
        "responses": [
            {
                "prompt_uid": "f:3",
                "sample": 0,
                "token_ids": "BQAAAAcAAAA=",
                "engine_logprobs": "AAAAvwAAgL8=",
                "text": "five seven",
                "finished": True,
                "weight_version": 4,
                "old_logprobs": "AACAvgAAgL8=",
                "score": {
                    "value": 1.0,
                    "rule": 1.0,
                    "judge": None,
                    "matched": "",
                    "prediction": "",
                },
            }
        ],
    }
    got = decode_group(saved, {"f:3": PROMPT})
    assert got.whole and got.old_logprobs is not None
    (rollout,), (old,) = got.rollouts, got.old_logprobs
    assert (rollout.token_ids.tolist(), rollout.engine_logprobs.tolist()) == ([5, 7], [-0.5, -1.0])
    assert (rollout.token_versions.tolist(), rollout.finished) == ([4, 4], True)
    assert old.tolist() == [-0.25, -1.0]
