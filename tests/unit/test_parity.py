"""The helper of the parity tests accepts float32 and refuses small mistakes."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.parity import Reference, pooled

# [heads, tokens, dim]
QUERY, KEY, VALUE = torch.randn(3, 4, 40, 16, generator=torch.Generator().manual_seed(0))
SCALE = 0.25


def attention(query: torch.Tensor, key: torch.Tensor, scale: float = SCALE) -> np.ndarray:
    """Causal, written out."""
    scores = query @ key.transpose(1, 2) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ VALUE.to(query.dtype)).numpy()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.of(attention(QUERY.double(), KEY.double()), attention(QUERY, KEY))


def test_another_order_of_sums_is_accepted(reference: Reference) -> None:
    ours = scaled_dot_product_attention(QUERY, KEY, VALUE, is_causal=True, scale=SCALE)
    reference.check(ours)


SHIFTED = torch.cat([KEY[:, :1], KEY[:, :-1]], 1)
SWAPPED = QUERY[[1, 0, 2, 3]]


@pytest.mark.parametrize(
    "wrong",
    [
        attention(QUERY, KEY, SCALE * (1 + 1e-4)),
        attention(SWAPPED, KEY),
        attention(QUERY, SHIFTED),
        attention(QUERY, KEY) * np.float32(1 + 1e-4),
        attention(QUERY, KEY) * np.nan,
    ],
    ids=["scale", "two heads swapped", "positions", "factor", "nan"],
)
def test_mistakes_are_refused(reference: Reference, wrong: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        reference.check(wrong)


def test_one_wrong_value_among_many_is_refused(reference: Reference) -> None:
    ours = attention(QUERY, KEY)
    ours[2, 30, 5] += 1e-5
    with pytest.raises(AssertionError):
        reference.check(ours)


def test_bounds_by_hand() -> None:
    """Errors of the peer 0 and 0.25; the units of 1024 and of rms(4, 1024) = 724.1."""
    bounds = Reference.of(np.array([4.0, 1024.0]), np.array([4.0, 1024.25], np.float32))
    assert bounds.max_error == 3 * 0.25 + 8 * 2.0**-13
    assert bounds.rms_error == pytest.approx(1.5 * 0.25 / 2**0.5 + 8 * 2.0**-14, rel=1e-12)
    bounds.check([4.0, 1024.375])
    with pytest.raises(AssertionError):  # within the largest error, beyond the mean one
        bounds.check([4.5, 1024.5])


def test_mean_and_norm_have_the_error_of_all_values() -> None:
    bounds = Reference.of(np.array([3.0, 4.0]), np.array([3.0, 4.0], np.float32))
    unit = 2.0**-22  # of rms(3, 4) = 3.54
    bounds.check_mean(3.5 + 7.9 * unit)
    bounds.check_norm(5.0 + 11 * unit)  # 8 units by the root of 2
    with pytest.raises(AssertionError):
        bounds.check_mean(3.5 + 8.1 * unit)
    with pytest.raises(AssertionError):
        bounds.check_norm(5.0 + 12 * unit)


def test_tensors_are_pooled_in_units_of_their_exact_values() -> None:
    exact = {"large": np.array([[30.0, 40.0]]), "small": np.array([0.5])}
    found = {"small": torch.tensor([0.25]), "large": torch.tensor([[30.0, 80.0]])}
    unit = 1250**0.5  # rms(30, 40)
    assert pooled(found, exact).tolist() == pytest.approx([30 / unit, 80 / unit, 0.5])
    with pytest.raises(AssertionError):
        pooled({"large": found["large"]}, exact)
