"""CUDA or CPU: the one place that decides."""

import torch


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def backend() -> str:
    """torch.distributed backend; on GPU, gloo serves the CPU tensors."""
    return "cpu:gloo,cuda:nccl" if has_gpu() else "gloo"


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: there is a GPU, and the layers that Megatron takes
    from it load. (Without its torch extension the package itself can be imported all the same.)"""
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
