"""Which checkpoint a new run starts from, which it never does, and what it remembers of it."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import CheckpointError, ConfigError
from megatron_qlrl.train.parent import (
    Parent,
    check_fit,
    find_parent,
    parent_of,
    same_rows,
    with_parent,
)
from megatron_qlrl.weights.checkpoint_folder import FORMAT, read_state

pytestmark = pytest.mark.usefixtures("lone_group")

ROWS = "the training data, as the model sees it"
PRINT: dict[str, Any] = {
    "contents": {
        "the model's config.json": "c",
        "the model's weights": "w",
        "the tokenizer": "t",
        "the chat template": "h",
        ROWS: "r",
    },
    "dtype": "float32",
    "meaning": {},
    "phases": [{"steps": 4, "meaning": {"policy.distributed_optimizer": True, "run.seed": 1}}],
    "told": {},
}
STATE: dict[str, Any] = {
    "format": FORMAT,
    "command": "rl",
    "step": 4,
    "dtype": "float32",
    "fingerprint": PRINT,
}


def checkpoint(run: Path, step: int, **state: Any) -> Path:
    return write_checkpoint(run / "checkpoints" / f"step_{step:08d}", STATE | state)


def config_of(tmp_path: Path, parent: str | None) -> Config:
    run = {"dir": str(tmp_path / "child"), "parent": parent}
    return Config.model_validate({"model": {"path": "m"}, "run": run})


def parent_at(
    tmp_path: Path, parent: str | None, warnings: list[str] | None = None
) -> Parent | None:
    warn = print if warnings is None else warnings.append
    return find_parent(config_of(tmp_path, parent), warn=warn)


def test_the_newest_checkpoint_or_that_of_a_step(tmp_path: Path) -> None:
    run = tmp_path / "base"
    newest, older = checkpoint(run, 12), checkpoint(run, 4)
    parent = parent_at(tmp_path, str(run))
    digest = hashlib.sha256((newest / "manifest.json").read_bytes()).hexdigest()
    assert parent is not None and parent == Parent(str(run), 12, digest)
    assert parent.checkpoint == newest
    assert parent.fact() == (
        f"base at step 12 (sha256 of that checkpoint's manifest.json: {digest})"
    )
    named = parent_at(tmp_path, f"{run}:4")
    assert named is not None and named.checkpoint == older
    assert parent_at(tmp_path, None) is None


def test_a_relative_folder_is_remembered_as_a_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "base", 4)
    monkeypatch.chdir(tmp_path)
    parent = parent_at(tmp_path, "base")
    assert parent is not None and parent.setting == f"{tmp_path}/base:4"
    assert with_parent(config_of(tmp_path, "base"), parent).run.parent == parent.setting
    assert with_parent(config_of(tmp_path, "base"), None).run.parent is None


def test_a_torn_checkpoint_is_never_taken(tmp_path: Path) -> None:
    run, warnings = tmp_path / "base", list[str]()
    checkpoint(run, 4)
    torn = checkpoint(run, 12)
    (torn / "weights" / "common.pt").write_bytes(b"?")
    parent = parent_at(tmp_path, str(run), warnings)
    assert parent is not None and parent.step == 4
    problem = "weights/common.pt does not match its checksum"
    assert warnings == [f"checkpoint {torn} is passed over: {problem}"]
    with pytest.raises(CheckpointError, match=f"{torn} is not whole: {problem}; name another"):
        parent_at(tmp_path, f"{run}:12")
    (run / "checkpoints" / "step_00000004" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=f"no checkpoint of {run} is whole"):
        parent_at(tmp_path, str(run))
    with pytest.raises(ConfigError, match="it has those of 4, 12"):
        parent_at(tmp_path, f"{run}:5")


def test_a_run_remembers_its_parent_whatever_has_become_of_it(tmp_path: Path) -> None:
    base, gone = str(tmp_path / "base"), Parent(str(tmp_path / "base"), 12, "d")
    own = checkpoint(tmp_path / "child", 1, parent=gone.state())
    for text in (None, base, f"{base}:12"):
        assert parent_of(own, config_of(tmp_path, text)) == gone
    for text in (f"{base}:4", str(tmp_path / "other")):
        with pytest.raises(CheckpointError, match=f"began from {base}:12. Leave run.parent"):
            parent_of(own, config_of(tmp_path, text))


def test_a_run_gets_no_parent_later(tmp_path: Path) -> None:
    own = checkpoint(tmp_path / "child", 1)
    assert parent_of(own, config_of(tmp_path, None)) is None
    with pytest.raises(CheckpointError, match="is of a run that began by itself"):
        parent_of(own, config_of(tmp_path, str(tmp_path / "base")))


@pytest.mark.parametrize("saved", [{"run": "r"}, {"run": "r", "step": 1, "manifest": "d", "x": 1}])
def test_a_damaged_record_of_the_parent_is_the_checkpoints_fault(
    tmp_path: Path, saved: dict[str, Any]
) -> None:
    own = checkpoint(tmp_path / "child", 1, parent=saved)
    with pytest.raises(CheckpointError, match="does not hold the state"):
        parent_of(own, config_of(tmp_path, None))


def changed(**changes: Any) -> dict[str, Any]:
    return PRINT | changes


def test_all_but_the_model_may_differ(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4)
    phase = {"steps": 9, "meaning": {"policy.distributed_optimizer": True, "run.seed": 2}}
    contents = PRINT["contents"] | {"the model's weights": "other", ROWS: "other"}
    now = changed(contents=contents, phases=[phase], told={"policy.tp": 2})
    assert check_fit(path, read_state(path), now) == ""
    assert [same_rows(STATE, rows) for rows in ("r", "other")] == [True, False]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"dtype": "bfloat16"}, "model.dtype: float32 -> bfloat16 must be"),
        (
            {
                "contents": PRINT["contents"]
                | {"the model's config.json": "x", "the tokenizer": "y"}
            },
            "the model's config.json; the tokenizer must be",
        ),
        ({"contents": PRINT["contents"] | {"the chat template": "x"}}, "the chat template must be"),
        (
            {"phases": [{"steps": 4, "meaning": {"policy.distributed_optimizer": False}}]},
            "policy.distributed_optimizer: True -> False must be",
        ),
    ],
)
def test_another_model_is_refused_by_name(tmp_path: Path, now: dict[str, Any], said: str) -> None:
    path = checkpoint(tmp_path, 4)
    with pytest.raises(CheckpointError, match=f"cannot start from {path}: .*{said}"):
        check_fit(path, read_state(path), changed(**now))


def test_a_run_of_sft_is_a_parent_and_an_import_is_none(tmp_path: Path) -> None:
    sft = changed(meaning={"policy.distributed_optimizer": True}, phases=[])
    path = checkpoint(tmp_path, 4, command="sft", fingerprint=sft)
    assert check_fit(path, read_state(path), PRINT) == ""
    imported = checkpoint(tmp_path, 5, command="import")
    with pytest.raises(CheckpointError, match="is of `qlrl import`, and a run starts from one of"):
        check_fit(imported, read_state(imported), PRINT)


def test_a_checkpoint_without_fingerprint_is_taken_with_a_line(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4)
    state = {name: value for name, value in STATE.items() if name != "fingerprint"}
    assert "does not say which model and data" in check_fit(path, state, PRINT)
    assert not same_rows(state, "r")
    with pytest.raises(CheckpointError, match="model.dtype"):
        check_fit(path, state, changed(dtype="bfloat16"))
