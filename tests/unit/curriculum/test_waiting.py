import json

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
