"""What this machine has, as names and reasons: torch-free, so that `qlrl check` can say it."""

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Choice:
    """What is used here, and why."""

    name: str
    why: str


def attention_kernel(*, gpu: bool) -> Choice:
    """The kernel of `policy.kernels` for a machine with or without a GPU."""
    if not gpu:
        return Choice("aten_cpu", "no GPU: torch's CPU flash kernel")
    if find_spec("flash_attn"):
        return Choice("flash_attn", "flash-attn is installed: grouped keys are not copied")
    return Choice("aten_cuda", "flash-attn is not installed: torch's own CUDA flash kernel")
