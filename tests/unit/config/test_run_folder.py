"""Which checkpoints `run.parent` may stand for, and what is said where there is none."""

from pathlib import Path
from typing import Any

import pytest

from megatron_qlrl.config.run_folder import (
    check_parent,
    checkpoints_of,
    named_checkpoints,
    split_parent,
    step_of,
)
from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import ConfigError


def make_run(folder: Path, *steps: int) -> Path:
    for step in steps:
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    return folder


def config_of(**run: Any) -> Config:
    return Config.model_validate({"model": {"path": "m"}, "run": run})


@pytest.mark.parametrize(
    ("text", "run", "step"),
    [
        ("runs/a", "runs/a", None),
        ("runs/a:12", "runs/a", 12),
        ("/data/a:0", "/data/a", 0),
        ("a:b:3", "a:b", 3),
        ("a:b", "a:b", None),
        ("a:", "a:", None),
        (":3", ":3", None),
        ("a:-3", "a:-3", None),
        ("a:³", "a:³", None),
    ],
)
def test_a_step_is_the_number_behind_the_last_colon(text: str, run: str, step: int | None) -> None:
    assert split_parent(text) == (Path(run), step)


def test_checkpoints_are_named_in_order(tmp_path: Path) -> None:
    make_run(tmp_path, 12, 4)
    for name in ("step_00000020.tmp", "step_9", "other"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert [step_of(path) for path in checkpoints_of(tmp_path)] == [4, 12]
    assert [step_of(path) for path in named_checkpoints(str(tmp_path))] == [4, 12]
    assert [step_of(path) for path in named_checkpoints(f"{tmp_path}:4")] == [4]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder .*/gone "):
        named_checkpoints(f"{tmp_path}/gone:4")
    with pytest.raises(ConfigError, match="has no checkpoint "):
        named_checkpoints(str(tmp_path))
    make_run(tmp_path, 4, 12)
    with pytest.raises(ConfigError, match="no checkpoint of step 5; it has those of 4, 12$"):
        named_checkpoints(f"{tmp_path}:5")


def test_a_run_is_not_its_own_parent(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 4)
    (tmp_path / "link").symlink_to(run)
    for parent in (str(run), f"{run}:4", str(tmp_path / "link")):
        with pytest.raises(ConfigError, match="is run.dir itself"):
            check_parent(config_of(dir=str(run), parent=parent))


def test_a_run_with_checkpoints_of_its_own_needs_its_parent_no_more(tmp_path: Path) -> None:
    config = config_of(dir=str(tmp_path / "child"), parent=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="there is no folder"):
        check_parent(config)
    make_run(tmp_path / "child", 1)
    check_parent(config)
    anew = config.checkpoint.model_copy(update={"resume": False})
    with pytest.raises(ConfigError, match="there is no folder"):
        check_parent(config.model_copy(update={"checkpoint": anew}))
    check_parent(config_of(dir=str(tmp_path / "other")))
