"""What is subtracted from the engine's logits."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_qlrl.rollout.normalize import normalize_logits, subtract_logsumexp


def test_after_the_temperature_logits_are_logprobs() -> None:
    """At temperature 0.5, logits 0, ln 2, ln 3 have weights 1, 4 and 9 of 14."""
    logits = torch.tensor([[0.0, math.log(2), math.log(3)]])
    found = subtract_logsumexp(logits.clone(), 0.5) / 0.5
    assert found.exp()[0].tolist() == pytest.approx([1 / 14, 4 / 14, 9 / 14])
    found = subtract_logsumexp(logits, 1.0)
    assert found.exp()[0].tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_every_row_is_normalised_in_place() -> None:
    logits = torch.randn(67, 11, generator=torch.Generator().manual_seed(0)) * 5
    logits[3, 4] = -torch.inf  # a token that is not allowed
    want = (logits.double() / 0.7).log_softmax(-1)
    found = subtract_logsumexp(logits, 0.7)
    assert found is logits
    torch.testing.assert_close(found.double() / 0.7, want, atol=1e-5, rtol=0)


def test_a_model_computes_normalised_logits_in_float32_at_the_present_temperature() -> None:
    temperature = [1.0]
    model = SimpleNamespace(compute_logits=lambda hidden: hidden and torch.zeros(1, 4).bfloat16())
    normalize_logits(model, lambda: temperature[0])
    assert model.compute_logits(None) is None
    for now in (1.0, 0.5):
        temperature[0] = now
        logits = model.compute_logits(True)
        assert logits.dtype is torch.float32
        assert logits.tolist() == [pytest.approx([-now * math.log(4)] * 4)]
