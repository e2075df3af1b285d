"""Packages that are half there: what counts is whether the functions that are called load."""

import sys
from pathlib import Path

import pytest
import torch

from megatron_qlrl.platform import device
from megatron_qlrl.platform.machine import attention_kernel


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that are imported first; none of them is imported yet."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in list(sys.modules):
        if name.partition(".")[0] in ("flash_attn", "transformer_engine"):
            monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("flash_attn", "transformer_engine"):
            del sys.modules[name]


def write(file: Path, text: str = "") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    for folder in (file.parent, file.parent.parent):
        if folder.name in ("flash_attn", "cute", "transformer_engine", "pytorch"):
            (folder / "__init__.py").touch()
    file.write_text(text)


SOUND = "def _flash_attn_forward(): ...\ndef _flash_attn_backward(): ...\n"


@pytest.mark.parametrize(
    ("file", "text", "kernel"),
    [
        ("flash_attn_interface.py", SOUND, "flash_attn"),
        ("cute/interface.py", SOUND, "aten_cuda"),  # flash-attn-4 alone: no 2.x interface
        ("flash_attn_interface.py", "import flash_attn_2_cuda_is_missing", "aten_cuda"),
        ("flash_attn_interface.py", "def flash_attn_func(): ...", "aten_cuda"),
        ("flash_attn_interface.py", "raise OSError('libcudart.so.12')", "aten_cuda"),
    ],
)
def test_flash_attn_is_chosen_if_its_functions_load(
    packages: Path, file: str, text: str, kernel: str
) -> None:
    write(packages / "flash_attn" / file, text)
    choice = attention_kernel(gpu=True)
    assert choice.name == kernel
    assert ("cannot be used" in choice.why) == (kernel == "aten_cuda")


def test_the_reason_why_flash_attn_is_not_taken(packages: Path) -> None:
    assert attention_kernel(gpu=True).why.startswith("flash-attn is not installed")
    write(packages / "flash_attn" / "flash_attn_interface.py", "import nowhere_to_be_seen")
    assert "No module named 'nowhere_to_be_seen'" in attention_kernel(gpu=True).why
    assert attention_kernel(gpu=False).name == "aten_cpu"


LAYERS = "class Linear: ...\nclass LayerNormLinear: ...\nclass RMSNorm: ...\n"


@pytest.mark.parametrize(
    ("pytorch", "present"),
    [
        (LAYERS, True),
        (None, False),
        ("raise ImportError('undefined symbol')", False),
        ("raise FileNotFoundError('Could not find shared object file: torch')", False),
        ("class Linear: ...", False),
    ],
)
def test_transformer_engine_counts_if_its_layers_load(
    packages: Path, monkeypatch: pytest.MonkeyPatch, pytorch: str | None, present: bool
) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    # As Transformer Engine does: a torch extension that fails leaves the package importable.
    write(packages / "transformer_engine" / "common.py")
    if pytorch is not None:
        write(packages / "transformer_engine" / "pytorch" / "layers.py")
        (packages / "transformer_engine" / "pytorch" / "__init__.py").write_text(pytorch)
    assert device.has_transformer_engine() == present


def test_deterministic_kernels_are_asked_for_strictly_in_the_block_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "")  # what is set below is taken back
    try:
        with device.strictly_deterministic():
            assert not torch.are_deterministic_algorithms_enabled()
        device.use_deterministic_kernels()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        with pytest.raises(ZeroDivisionError), device.strictly_deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            _ = 1 / 0
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
