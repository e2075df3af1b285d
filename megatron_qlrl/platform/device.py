"""The one place that decides between CUDA and the CPU."""

import resource

import torch


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Returns the device of this rank's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def backend() -> str:
    """Returns the torch.distributed backend; with a GPU, gloo serves the CPU tensors."""
    return "cpu:gloo,cuda:nccl" if has_gpu() else "gloo"


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
    and on a GPU what torch allocated and reserved."""
    resident_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics = {"perf/max_rss_gb": resident_kib * 1024 / 1e9}
    if has_gpu():
        metrics["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
        metrics["perf/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return metrics
