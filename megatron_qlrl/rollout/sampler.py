"""Groups of responses: which engine samples what, and with which seeds."""

import hashlib
from collections.abc import Callable, Sequence

from megatron_qlrl.rollout.vllm_engine import Completion, Generate, Request, Sampling
from megatron_qlrl.types import Prompt, Rollout


def token_seed(*, run_seed: int, step: int, prompt_uid: str, sample: int) -> int:
    """Seed of one response, from its identity alone: a resumed run draws the same tokens, and
    which engine draws them does not matter. Evaluation uses negative steps."""
    identity = f"{run_seed}/{step}/{prompt_uid}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big") >> 1


def share_prompts(prompts: Sequence[Prompt], num_engines: int) -> list[list[int]]:
    """Indices of the prompts for each engine: whole groups (the engine's prefix cache holds a
    prompt once for its G responses), longest first to the least loaded engine."""
    loads = [0] * num_engines
    shares: list[list[int]] = [[] for _ in range(num_engines)]
    for index in sorted(range(len(prompts)), key=lambda i: (-prompts[i].num_tokens, i)):
        engine = loads.index(min(loads))
        shares[engine].append(index)
        loads[engine] += prompts[index].num_tokens
    return [sorted(share) for share in shares]


def sample_groups(
    prompts: Sequence[Prompt],
    generate: Generate,
    *,
    group_size: int,
    sampling: Sampling,
    run_seed: int,
    step: int,
    weight_version: int,
    decode: Callable[[Sequence[int]], str],
    on_done: Callable[[int, Rollout], None],
) -> list[tuple[Rollout, ...]]:
    """`group_size` responses to each prompt, from this engine alone.

    `on_done` is called with the prompt's number and each response as it ends, in any order,
    while others go on.
    """
    requests = [
        Request(
            prompt.token_ids,
            token_seed(run_seed=run_seed, step=step, prompt_uid=prompt.uid, sample=sample),
        )
        for prompt in prompts
        for sample in range(group_size)
    ]
    rollouts: dict[int, Rollout] = {}

    def finish(index: int, done: Completion) -> None:
        number, sample = divmod(index, group_size)
        rollouts[index] = Rollout(
            prompt_uid=prompts[number].uid,
            sample=sample,
            token_ids=done.token_ids,
            engine_logprobs=done.logprobs,
            text=decode(done.token_ids.tolist()),
            finished=done.finished,
            weight_version=weight_version,
        )
        on_done(number, rollouts[index])

    generate(requests, sampling, finish)
    return [
        tuple(rollouts[number * group_size + sample] for sample in range(group_size))
        for number in range(len(prompts))
    ]
