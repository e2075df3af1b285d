"""The CPU stand-in for CUDA holds inside its context and nowhere else."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_qlrl.platform.device import has_gpu
from megatron_qlrl.platform.megatron_cpu import megatron_device

pytestmark = pytest.mark.skipif(has_gpu(), reason="with a GPU the context does nothing")

PATCHED = [
    (torch.cuda, "current_device"),
    (torch.cuda, "synchronize"),
    (torch.cuda, "manual_seed"),
    (torch.cuda, "get_rng_state"),
    (torch.cuda, "set_rng_state"),
    (torch.cuda.random, "get_rng_state"),
    (torch.Tensor, "cuda"),
    (torch.Tensor, "type"),
]


def patched() -> list[Any]:
    return [getattr(owner, name) for owner, name in PATCHED]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Whatever a test does, everything is as it was afterwards."""
    before, attributes = patched(), [set(vars(owner)) for owner, _ in PATCHED]
    yield
    assert patched() == before
    assert [set(vars(owner)) for owner, _ in PATCHED] == attributes
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def works() -> bool:
    return (
        torch.zeros(1, device="cuda").device.type == "cpu"
        and torch.zeros(1).type() == "torch.cuda.FloatTensor"
    )


def test_cuda_means_cpu_inside() -> None:
    outside = patched()
    with megatron_device():
        assert all(now != then for now, then in zip(patched(), outside, strict=True))
        assert torch.cuda.current_device() == torch.device("cpu")
        assert torch.empty(2, device=torch.device("cuda", 0)).device.type == "cpu"
        assert torch.ones(2, device="cpu").tolist() == [1.0, 1.0]
        tensor = torch.ones(2)
        assert tensor.cuda() is tensor
        torch.cuda.synchronize()


def test_type_names_are_those_of_cuda_tensors() -> None:
    with megatron_device():
        found = [
            torch.zeros(1, dtype=dtype).type()
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
        ]
        converted = torch.ones(1).type(torch.int32)
    assert found == [
        "torch.cuda.FloatTensor",
        "torch.cuda.HalfTensor",
        "torch.cuda.BFloat16Tensor",
        "torch.cuda.DoubleTensor",
        "torch.LongTensor",
    ]
    assert converted.dtype == torch.int32


def test_random_state_is_the_cpus() -> None:
    with megatron_device():
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        again = torch.rand(3)
    torch.manual_seed(5)
    want = torch.rand(3)
    assert torch.equal(first, want)
    assert torch.equal(again, want)


def test_nested_contexts_restore_only_at_the_outermost_end() -> None:
    with megatron_device():
        with megatron_device():
            assert works()
        assert works()


def test_error_inside_restores_and_the_next_context_works() -> None:
    with pytest.raises(ValueError, match="inner"), megatron_device(), megatron_device():
        raise ValueError("inner")
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with megatron_device():
        with pytest.raises(ValueError, match="caught"), megatron_device():
            raise ValueError("caught")
        assert works()
