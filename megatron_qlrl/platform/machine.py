"""What this machine has, as names and reasons: torch-free, so that `qlrl check` can say it."""

import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


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


def commit() -> str | None:
    """The git commit of the checkout that runs, "+changes" when its files differ from it; None for
    a package that runs from no checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    describe = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    done = subprocess.run(
        ["git", "-C", str(root), *describe], check=False, capture_output=True, text=True
    )
    return done.stdout.strip() or None
