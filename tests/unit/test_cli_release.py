"""`qlrl release`: lines, JSON and exit codes; the parts have tests of their own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_qlrl.cli import app


def invoke(*argv: str | Path) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["release", *map(str, argv)])
    return result.exit_code, result.output.splitlines()


@pytest.fixture
def folder(fake_hf: Callable[..., Path]) -> Path:
    folder = fake_hf(dtype="float32")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_static_checks_load_nothing_and_pass(folder: Path) -> None:
    code, lines = invoke("check", folder, "--static")
    assert code == 0
    assert [line.partition(":")[0] for line in lines] == [
        "ok       files", "ok       modes", "ok       config", "ok       weights",
        "ok       tokenizer", "ok       card",
    ]  # fmt: skip


def test_a_failed_check_ends_the_command_before_anything_is_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    code, lines = invoke("check", folder)
    assert code == 1
    assert [line for line in lines if line.startswith("failed   weights: ")]
    assert len(lines) == 6


def test_json_has_every_check(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"")
    code, lines = invoke("check", folder, "--static", "--json")
    assert code == 1
    results = json.loads("\n".join(lines))
    assert [r["status"] for r in results] == ["failed", "ok", "ok", "ok", "ok", "ok"]
    assert results[0]["detail"].startswith(f"{folder / 'a.bin'} does not belong in a release")
