"""Segment attention against dense masked attention written out in float64."""

import numpy as np
import pytest
import torch

from megatron_qlrl.policy.attention import segment_attention
from megatron_qlrl.types import Piece
from tests.parity import Reference

DIM = 8

# Blocks of a row: (prompt tokens, response tokens ...).
ROW = [(5, 2, 3), (1, 4), (3, 1, 6, 2)]
# The same row's attention written down by hand: each prompt on itself, each response on itself,
# all responses of a block on their prompt; a lone response simply continues its prompt.
PIECES = (
    Piece(0, 5, 0, 5, causal=True),
    Piece(5, 7, 5, 7, causal=True),
    Piece(7, 10, 7, 10, causal=True),
    Piece(10, 15, 10, 15, causal=True),
    Piece(15, 18, 15, 18, causal=True),
    Piece(18, 19, 18, 19, causal=True),
    Piece(19, 25, 19, 25, causal=True),
    Piece(25, 27, 25, 27, causal=True),
    Piece(5, 10, 0, 5, causal=False),
    Piece(18, 27, 15, 18, causal=False),
)


def row_mask(blocks: list[tuple[int, ...]]) -> torch.Tensor:
    """[T, T], from the rule: a token sees itself and what lies before it in its own prompt
    and its own response."""
    block_of, segment_of = [], []
    for b, lengths in enumerate(blocks):
        for s, n in enumerate(lengths):
            block_of += [b] * n
            segment_of += [s] * n
    num = len(block_of)
    return torch.tensor(
        [
            [
                k <= q and block_of[q] == block_of[k] and segment_of[k] in (0, segment_of[q])
                for k in range(num)
            ]
            for q in range(num)
        ]
    )


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """One head at a time; query head h uses key/value head h // (heads per key/value head)."""
    outs = []
    group = query.shape[1] // key.shape[1]
    for h in range(query.shape[1]):
        scores = query[:, h] @ key[:, h // group].t() * scale
        scores = scores.masked_fill(~mask, -torch.inf)
        outs.append(scores.softmax(-1).nan_to_num(0.0) @ value[:, h // group])
    return torch.stack(outs, 1)


def tensors(
    queries: int, keys: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """query, key, value and a gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)]
    made = [torch.randn(*s, DIM, generator=generator, dtype=torch.float64) for s in shapes]
    return [t.to(dtype) for t in made]


def check(
    pieces: tuple[Piece, ...],
    mask: torch.Tensor,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float64,
) -> None:
    query, key, value, grad = tensors(*mask.shape, heads, kv_heads, dtype)
    scale = 0.4
    mine = [t.clone().requires_grad_() for t in (query, key, value)]
    out = segment_attention(mine[0], mine[1], mine[2], pieces, scale)
    found = [out, *torch.autograd.grad(out, mine, grad)]
    assert {t.dtype for t in found} == {dtype}
    wide = [t.double() for t in (query, key, value, grad)]
    exact = dense_with_gradients(*wide, mask, scale)
    if dtype == torch.float64:
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    else:
        peer = dense_with_gradients(query, key, value, grad, mask, scale)
        for a, b, c in zip(found, exact, peer, strict=True):
            Reference.of(b.detach(), c.detach()).check(a.detach())


def dense_with_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> list[torch.Tensor]:
    inputs = [t.clone().requires_grad_() for t in (query, key, value)]
    out = dense(inputs[0], inputs[1], inputs[2], mask, scale)
    seen = mask.any(1)[:, None, None]
    # Where nothing is seen the softmax is not defined: the reference leaves those rows out.
    gradients = torch.autograd.grad(
        torch.where(seen, out, 0.0), inputs, torch.where(seen, grad, 0.0)
    )
    return [out, *gradients]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (4, 1), (3, 3)])
def test_shared_prompts_of_several_blocks(heads: int, kv_heads: int) -> None:
    check(PIECES, row_mask(ROW), heads, kv_heads)


def test_float32() -> None:
    check(PIECES, row_mask(ROW), dtype=torch.float32)


def test_order_of_pieces_does_not_matter() -> None:
    order = np.random.default_rng(0).permutation(len(PIECES))
    check(tuple(PIECES[i] for i in order), row_mask(ROW))


def test_plain_sequence_is_one_causal_piece() -> None:
    check((Piece(0, 9, 0, 9, causal=True),), row_mask([(9,)]))


def test_local_queries_on_all_keys() -> None:
    """What context parallel rank 0 of 2 computes of a sequence of 12: tokens 0-2 and 9-11."""
    pieces = (
        Piece(0, 3, 0, 3, causal=True),
        Piece(3, 6, 0, 9, causal=False),
        Piece(3, 6, 9, 12, causal=True),
    )
    check(pieces, row_mask([(12,)])[[0, 1, 2, 9, 10, 11]])


def test_queries_without_pieces_get_zeros() -> None:
    mask = torch.cat([row_mask([(6,)]), torch.zeros(3, 6, dtype=torch.bool)])
    pieces = (Piece(0, 6, 0, 6, causal=True),)
    check(pieces, mask)
    query, key, value, grad = tensors(9, 6, 4, 2)
    query.requires_grad_()
    out = segment_attention(query, key, value, pieces, 0.4)
    (by_query,) = torch.autograd.grad(out, query, grad)
    assert torch.equal(out[6:], torch.zeros(3, 4, DIM, dtype=torch.float64))
    assert torch.equal(by_query[6:], torch.zeros(3, 4, DIM, dtype=torch.float64))


def test_two_keys_by_hand() -> None:
    """Scores 0 and log 3: the second token weighs the values 1/4 and 3/4."""
    query = torch.zeros(2, 1, DIM, dtype=torch.float64)
    key, value = torch.zeros_like(query), torch.zeros_like(query)
    query[1, 0, 0], key[1, 0, 0] = 1.0, np.log(3) / 0.5
    value[:, 0, 0] = torch.tensor([8.0, 4.0])
    out = segment_attention(query, key, value, (Piece(0, 2, 0, 2, causal=True),), 0.5)
    assert out[:, 0, 0].tolist() == pytest.approx([8.0, 5.0])


def test_far_apart_scores_merge_without_overflow() -> None:
    """Pieces whose log-sum-exps lie hundreds apart: the larger one takes everything."""
    query = torch.full((1, 1, DIM), 10.0, dtype=torch.float64)
    key = torch.stack([torch.full((1, DIM), v, dtype=torch.float64) for v in (9.0, -9.0)])
    value = torch.stack([torch.full((1, DIM), v, dtype=torch.float64) for v in (1.0, 2.0)])
    pieces = (Piece(0, 1, 1, 2, causal=False), Piece(0, 1, 0, 1, causal=False))
    out = segment_attention(query, key, value, pieces, 1.0)
    assert torch.equal(out, torch.ones_like(out))
