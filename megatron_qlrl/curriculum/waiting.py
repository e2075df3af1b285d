"""Groups that wait for a later step, as JSON that gives back the same bits.

Checkpoints of before have groups without `versions` and `goes_on`: all of their tokens are of one
version, and all of their responses have ended.
"""

import base64
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup

_ARRAYS = {
    "token_ids": np.int32,
    "engine_logprobs": np.float32,
    "versions": np.int32,
    "old_logprobs": np.float32,
}


def encode_group(group: ScoredGroup) -> dict[str, Any]:
    """A group with its old log-probs; the prompt by its uid. About 16 bytes a token, 22 if
    weights of several versions sampled it."""
    assert group.old_logprobs is not None
    responses: list[dict[str, Any]] = []
    for rollout, score, old in zip(group.rollouts, group.scores, group.old_logprobs, strict=True):
        fields = vars(rollout) | {"old_logprobs": old}
        arrays = {
            name: _encode(fields[name], kind)
            for name, kind in _ARRAYS.items()
            if fields[name] is not None
        }
        responses.append(fields | arrays | {"score": asdict(score)})
    return {"uid": group.prompt.uid, "responses": responses}


def decode_group(saved: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> ScoredGroup:
    """The group that `encode_group` was given; `prompts` by uid."""
    rollouts: list[Rollout] = []
    scores: list[Score] = []
    old_logprobs: list[np.ndarray] = []
    for response in saved["responses"]:
        fields: dict[str, Any] = {k: v for k, v in response.items() if k != "score"}
        for name, kind in _ARRAYS.items():
            if fields.get(name) is not None:
                fields[name] = np.frombuffer(base64.b64decode(fields[name]), kind)
        old_logprobs.append(fields.pop("old_logprobs"))
        rollouts.append(Rollout(**fields))
        scores.append(Score(**response["score"]))
    prompt = prompts[saved["uid"]]
    return ScoredGroup(prompt, tuple(rollouts), tuple(scores), tuple(old_logprobs))


def _encode(array: np.ndarray, kind: type) -> str:
    assert array.dtype == kind, (array.dtype, kind)
    return base64.b64encode(array.tobytes()).decode()
