"""Lets Megatron-core run without CUDA: inside `megatron_device()` its CUDA calls mean the CPU.

Megatron-core hard-codes the CUDA device in its schedules, point-to-point communication,
optimizer and random-state code. Each replacement below stands for one such place. They hold
only inside the context, so nothing else in the process (vLLM above all) sees them. With a GPU
the context does nothing. Condition for removal: Megatron-core takes a device argument.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from megatron_qlrl.platform.device import has_gpu

_CPU = torch.device("cpu")
_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float64: "torch.cuda.DoubleTensor",
}
_depth = 0


class _CudaMeansCpu(TorchFunctionMode):
    """`torch.zeros([], device="cuda")` and the like, used by schedules and gradient clipping."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = _CPU
        return func(*args, **kwargs)


_original_type = torch.Tensor.type


def _type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    # The optimizer and gradient clipping compare these names to sort parameters.
    if not args and not kwargs and self.dtype in _TYPE_NAMES:
        return _TYPE_NAMES[self.dtype]
    return _original_type(self, *args, **kwargs)


def _cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self


def _set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    torch.set_rng_state(new_state)


def _counts_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The dispatcher of tokens to experts makes arrays of the numbers of tokens when it fetches
    them from a GPU; torch's all-to-all takes arrays and no tensors."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


class _Stream:
    """A stream of the CPU, on which every call is done when it returns. The same dispatcher fetches
    numbers on a stream of its own."""

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self) -> Any:
        return self

    def synchronize(self) -> None:
        pass


@contextmanager
def megatron_device() -> Iterator[None]:
    """A block for every call into Megatron-core; it can be nested."""
    global _depth  # noqa: PLW0603 - patches are process-wide, so is their depth
    if has_gpu() or _depth:
        yield
        return
    from megatron.core.transformer.moe import token_dispatcher

    replacements: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: _CPU),
        # 0.19 lets the stream wait for CUDA graphs before gradients are summed; there are none.
        (torch.cuda, "current_stream", lambda *_, **__: _Stream()),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "stream", nullcontext),
        (torch.cuda, "synchronize", lambda *_, **__: None),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", _set_rng_state),
        (torch.cuda.random, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _counts_on_cpu),
        (torch.Tensor, "cuda", _cuda),
        (torch.Tensor, "type", _type),
    ]
    with ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.enter_context(patch.object(owner, name, replacement))
        stack.enter_context(_CudaMeansCpu())
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
