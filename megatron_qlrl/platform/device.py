"""The one place that decides between CUDA and the CPU."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_qlrl.platform.env import set_deterministic_env


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Returns the device of this rank's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def backend() -> str:
    """Returns the torch.distributed backend; with a GPU, gloo serves the CPU tensors."""
    return "cpu:gloo,cuda:nccl" if has_gpu() else "gloo"


def use_deterministic_kernels() -> None:
    """Asks torch, cuBLAS and Transformer Engine for kernels that give the same bits each time; call
    it before the first matrix product. Where torch has none it warns once and goes on."""
    set_deterministic_env()
    torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def strictly_deterministic() -> Iterator[None]:
    """A block for torch's flash kernel: where torch may warn and go on, that kernel warns, though
    it has a deterministic mode. Without `use_deterministic_kernels` the block changes nothing."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if warns:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if warns:
            torch.use_deterministic_algorithms(True, warn_only=True)


def has_transformer_engine() -> bool:
    """Returns whether there is a GPU and the layers load that Megatron takes from Transformer
    Engine. (The package itself can be imported even without its torch extension.)"""
    if not has_gpu():
        return False
    try:
        from transformer_engine.pytorch import (  # noqa: F401  # pyright: ignore
            LayerNormLinear,
            Linear,
            RMSNorm,
        )
    except (ImportError, OSError):
        return False
    return True


def device_name() -> str:
    """Returns the driver's name for this rank's GPU, or "cpu" without one."""
    return torch.cuda.get_device_name() if has_gpu() else "cpu"


def weight_dtype(configured: str | None) -> str:
    """Returns `configured` (model.dtype), or by default bfloat16 with a GPU and float32 without."""
    return configured or ("bfloat16" if has_gpu() else "float32")


def memory_high_water() -> dict[str, float]:
    """Returns the most memory that this process has used so far, in GB (1e9 bytes): host memory,
    and on a GPU what torch allocated and reserved. torch counts the memory of an engine that
    sleeps, which others can use: so also what the device has in use now."""
    resident_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics = {"perf/max_rss_gb": resident_kib * 1024 / 1e9}
    if has_gpu():
        metrics["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
        metrics["perf/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        free, total = torch.cuda.mem_get_info()
        metrics["perf/memory_used_gb"] = (total - free) / 1e9
    return metrics
