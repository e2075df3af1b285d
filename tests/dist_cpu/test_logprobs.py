"""Vocabulary shards: log-probs, entropies and gradients equal those of the whole vocabulary."""

import torch
import torch.distributed as dist
from harness import run_ranks

from megatron_qlrl.policy.logprobs import token_logprobs

HIDDEN, NUM, TEMPERATURE = 6, 13, 0.7


def check_shards(rank: int, case: tuple[int, int]) -> None:
    vocab, rows = case  # real tokens; rows of each rank's shard
    world = dist.group.WORLD
    assert world is not None
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(NUM, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows * world.size(), HIDDEN, generator=generator, dtype=torch.float64)
    weight[vocab:] *= 100  # padding, which must never count
    targets = torch.randint(0, vocab, (NUM,), generator=generator)
    targets[0], targets[1] = 0, vocab - 1
    g_logprob, g_entropy = torch.linspace(-1, 2, NUM), torch.linspace(3, -1, NUM)

    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logp = (whole[0] @ whole[1][:vocab].t() / TEMPERATURE).log_softmax(-1)
    want = [logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)]
    total = (want[0] * g_logprob).sum() + (want[1] * g_entropy).sum()
    want += torch.autograd.grad(total, whole)

    here = slice(rank * rows, (rank + 1) * rows)
    mine = [hidden.clone().requires_grad_(), weight[here].clone().requires_grad_()]
    logprobs, entropy = token_logprobs(
        mine[0], mine[1], targets, temperature=TEMPERATURE, vocab_size=vocab, block=(5, 3),
        tp_group=world,
    )  # fmt: skip
    total = (logprobs * g_logprob).sum() + (entropy * g_entropy).sum()
    by_hidden, by_weight = torch.autograd.grad(total, mine)
    dist.all_reduce(by_hidden)  # the caller's tensor parallel region does this
    found = [logprobs, entropy, by_hidden, by_weight]
    want[3] = want[3][here]
    for name, a, b in zip(
        ("log-prob", "entropy", "d hidden", "d weight"), found, want, strict=True
    ):
        difference = (a - b).abs().max().item()
        assert difference < 1e-12, (name, case, rank, difference)


def test_vocabulary_shards_equal_the_whole_vocabulary() -> None:
    # an odd vocabulary; one without padding; one whose second shard is padding alone
    run_ranks(check_shards, 2, [(23, 16), (16, 8), (7, 8)])
