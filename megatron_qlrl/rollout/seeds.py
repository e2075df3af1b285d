"""Which engine samples which prompt, and the seed of every response."""

import hashlib
from collections.abc import Sequence

from megatron_qlrl.types import Prompt

EVALUATION_STEP = -1
"""Evaluation draws its seeds at this step, so that they never meet those of training."""


def token_seed(run_seed: int, step: int, prompt_uid: str, sample: int) -> int:
    """Seed of one response. It depends on the response's identity alone: a resumed run draws the
    same tokens, and which engine draws them does not matter."""
    identity = f"{run_seed}/{step}/{prompt_uid}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big") >> 1


def share_prompts(prompts: Sequence[Prompt], num_engines: int) -> list[list[int]]:
    """Indices of the prompts for each engine: the longest goes first, to the least loaded engine.
    A group is never divided, because the engine's prefix cache holds its prompt once."""
    loads = [0] * num_engines
    shares: list[list[int]] = [[] for _ in range(num_engines)]
    for index in sorted(range(len(prompts)), key=lambda i: (-prompts[i].num_tokens, i)):
        engine = loads.index(min(loads))
        shares[engine].append(index)
        loads[engine] += prompts[index].num_tokens
    return [sorted(share) for share in shares]
