"""Seeds, the share of each engine, and the groups made of an engine's answers."""

from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_qlrl.rollout.sampler import sample_groups, share_prompts, token_seed
from megatron_qlrl.rollout.vllm_engine import Completion, Request, Sampling
from megatron_qlrl.types import Prompt, Rollout


def prompt(uid: str, num_tokens: int = 3) -> Prompt:
    return Prompt(uid, np.arange(num_tokens, dtype=np.int32), "docqa", "?", "!")


def test_seed_never_changes() -> None:
    """Pinned: another value would make resumed and repeated runs draw other tokens."""
    seed = token_seed(run_seed=0, step=3, prompt_uid="train:17", sample=5)
    assert seed == 9194752490659632861
    again = token_seed(run_seed=0, step=3, prompt_uid="train:17", sample=5)
    assert again == seed


def test_seeds_are_distinct_and_fit_the_engine() -> None:
    seeds = {
        token_seed(run_seed=run, step=step, prompt_uid=uid, sample=sample)
        for run in (0, 1)
        for step in (-1, 0, 1, 11)
        for uid in ("a:1", "a:11", "b:1", "a:1/1")
        for sample in (0, 1, 11)
    }
    assert len(seeds) == 2 * 4 * 4 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_longest_prompt_first_to_the_least_loaded_engine() -> None:
    # 9 | 7, 6 to the second (13), 5 to the first (14), 2 to the second (15)
    prompts = [prompt("a", 2), prompt("b", 9), prompt("c", 6), prompt("d", 7), prompt("e", 5)]
    assert share_prompts(prompts, 2) == [[1, 4], [0, 2, 3]]
    assert share_prompts(prompts[:1], 3) == [[0], [], []]
    assert share_prompts([], 2) == [[], []]


@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 6))
def test_shares_cover_every_prompt_once_and_are_balanced(lengths: list[int], engines: int) -> None:
    prompts = [prompt(str(i), n) for i, n in enumerate(lengths)]
    shares = share_prompts(prompts, engines)
    assert len(shares) == engines
    assert sorted(sum(shares, [])) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_groups_of_an_engines_answers() -> None:
    prompts = [prompt("a:0", 2), prompt("a:1", 4)]
    sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=8)
    seen: list[tuple[Sequence[Request], Sampling]] = []
    ended: list[tuple[int, Rollout]] = []

    def generate(
        requests: Sequence[Request], how: Sampling, on_done: Callable[[int, Completion], None]
    ) -> None:
        """Answer n is n + 1 tokens, each of them n; the even ones ended by themselves. They end
        in another order than they were asked for."""
        seen.append((requests, how))
        for n in (3, 0, 5, 1, 4, 2):
            on_done(
                n,
                Completion(
                    np.full(n + 1, n, np.int32), np.full(n + 1, -0.5 * n, np.float32), n % 2 == 0
                ),
            )

    groups = sample_groups(
        prompts,
        generate,
        group_size=3,
        sampling=sampling,
        run_seed=4,
        step=9,
        weight_version=12,
        decode=lambda ids: ".".join(map(str, ids)),
        on_done=lambda number, rollout: ended.append((number, rollout)),
    )
    ((requests, how),) = seen  # one call: the engine batches
    assert how is sampling
    assert [len(r.prompt_ids) for r in requests] == [2, 2, 2, 4, 4, 4]
    want = [
        token_seed(run_seed=4, step=9, prompt_uid=p.uid, sample=s)
        for p in prompts
        for s in range(3)
    ]
    assert [r.seed for r in requests] == want
    flat = [r for group in groups for r in group]
    assert [(r.prompt_uid, r.sample) for r in flat] == [
        ("a:0", 0),
        ("a:0", 1),
        ("a:0", 2),
        ("a:1", 0),
        ("a:1", 1),
        ("a:1", 2),
    ]
    assert [r.text for r in flat[:3]] == ["0", "1.1", "2.2.2"]
    assert [r.token_ids.tolist() for r in flat[3:5]] == [[3] * 4, [4] * 5]
    assert [r.engine_logprobs.tolist() for r in flat[:2]] == [[0.0], [-0.5, -0.5]]
    assert [r.finished for r in flat] == [True, False] * 3
    assert {r.weight_version for r in flat} == {12}
    # each was handed on as it ended, with the number of its prompt
    assert [n for n, _ in ended] == [1, 0, 1, 0, 1, 0]
    assert [r for _, r in ended] == [flat[i] for i in (3, 0, 5, 1, 4, 2)]


def test_engine_without_prompts_makes_no_groups() -> None:
    found = sample_groups(
        [],
        lambda requests, sampling, on_done: None,
        group_size=2,
        sampling=Sampling(1.0, 1.0, 1),
        run_seed=0,
        step=0,
        weight_version=0,
        decode=str,
        on_done=lambda number, rollout: None,
    )
    assert found == []
