"""The structure of the package: layers, sole importers, and what stays free of torch.

Read from the source with ast, so imports inside functions count too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_qlrl"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("types", "errors"),
    ("config",),
    ("platform",),
    ("parallel", "metrics"),
    ("data", "curriculum", "rollout", "reward", "advantage", "packing", "policy", "weights"),
    ("evaluate", "plan"),
    ("train", "report"),
    ("rl", "sft", "distill", "behaviours", "release"),
    ("build",),
    ("commands", "bench"),
    ("launch",),
    ("cli",),
    ("__main__",),
)
"""Bottom to top. A part imports parts of lower rows only, never another one of its own row."""

SOLE_IMPORTERS = {
    "megatron": ("platform/", "parallel/context.py", "policy/", "weights/"),
    "vllm": ("platform/", "rollout/vllm_engine.py"),
    "wandb": ("metrics/sinks.py",),
}
ENVIRONMENT_READERS = ("platform/env.py", "launch/")
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def violations(file: str, source: str) -> list[str]:
    """What `source`, lying at `file` (relative to the package), must not contain."""
    tree = ast.parse(source)
    found = []
    for line, module in _imports(tree, file):
        top, _, rest = module.partition(".")
        if top == "megatron_qlrl" and rest and not _may_import(_part(file), rest.split(".")[0]):
            found.append(f"{file}:{line}: {_part(file)} must not import {module}")
        if top in SOLE_IMPORTERS and not file.startswith(SOLE_IMPORTERS[top]):
            found.append(f"{file}:{line}: must not import {top}")
    if not file.startswith(ENVIRONMENT_READERS):
        found += [f"{file}:{line}: must not read the environment" for line in _environ(tree)]
    return found


def _part(file: str) -> str:
    return file.split("/", 1)[0].removesuffix(".py")


def _layer(part: str) -> int:
    return next(i for i, row in enumerate(LAYERS) if part in row)


def _may_import(part: str, imported: str) -> bool:
    if part == "__init__":
        return False
    if imported == "__version__":
        return True
    return part == imported or _layer(imported) < _layer(part)


def _imports(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    """Every imported module: `from a import b` counts as a.b, which may be a module."""
    here = ["megatron_qlrl", *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            constants = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from ((node.lineno, str(value)) for value in constants[:1])


def _environ(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _name(node.value) == "os":
            if node.attr in ENVIRONMENT_NAMES:
                yield node.lineno
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and any(alias.name in ENVIRONMENT_NAMES for alias in node.names)
        ):
            yield node.lineno


def _name(node: ast.AST) -> str:
    """Last part of a name: `import_module` for both spellings of the call."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _sources() -> dict[str, str]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {f.relative_to(PACKAGE).as_posix(): f.read_text(encoding="utf-8") for f in files}


def test_package_keeps_its_layers() -> None:
    sources = _sources()
    assert len(sources) > 20
    found = [v for file, source in sources.items() for v in violations(file, source)]
    assert not found, "\n".join(found)


def test_every_part_has_a_layer() -> None:
    known = {part for row in LAYERS for part in row} | {"__init__"}
    assert {_part(file) for file in _sources()} <= known


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        (
            "reward/score.py",
            "from megatron_qlrl.data.dataset import read",
            "reward/score.py:1: reward must not import megatron_qlrl.data.dataset.read",
        ),
        (
            "config/load.py",
            "import megatron_qlrl.rl",
            "config must not import megatron_qlrl.rl",
        ),
        (
            "sft.py",
            "from megatron_qlrl import build",
            "sft must not import megatron_qlrl.build",
        ),
        (
            "policy/policy.py",
            "from ..weights import hf_map",
            "must not import megatron_qlrl.weights",
        ),
        (
            "metrics/meter.py",
            "from ..parallel.context import x",
            "must not import megatron_qlrl.pa",
        ),
        ("parallel/collectives.py", "import megatron.core", "must not import megatron"),
        ("rl.py", "def f():\n    from vllm import LLM", "rl.py:2: must not import vllm"),
        (
            "build.py",
            "import importlib\nimportlib.import_module('wandb')",
            "must not import wandb",
        ),
        ("cli.py", "import os\nx = os.environ['A']", "cli.py:2: must not read the environment"),
        ("cli.py", "import os\nos.getenv('A')", "must not read the environment"),
        ("data/dataset.py", "from os import environ as e", "must not read the environment"),
    ],
)
def test_violations_are_found(file: str, source: str, message: str) -> None:
    found = violations(file, source)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("policy/policy.py", "from megatron.core import parallel_state"),
        ("policy/policy.py", "from .model import build_model\nfrom ..config.schema import Config"),
        ("rollout/vllm_engine.py", "from vllm import LLM"),
        ("launch/slurm.py", "import os\nos.environ"),
        (
            "cli.py",
            "from megatron_qlrl.launch.local import launch\nfrom megatron_qlrl import commands",
        ),
    ],
)
def test_lawful_imports_pass(file: str, source: str) -> None:
    assert violations(file, source) == []


def test_command_line_and_checks_do_not_load_torch() -> None:
    code = (
        "import sys, megatron_qlrl.cli, megatron_qlrl.config.checks, megatron_qlrl.platform.env\n"
        "print([m for m in ('torch', 'numpy', 'vllm', 'megatron.core') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
