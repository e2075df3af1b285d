"""Which checkpoint is exported."""

from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

from megatron_qlrl.commands import run_export
from megatron_qlrl.errors import CheckpointError

STATE: dict[str, Any] = {"format": 2, "facts": {}, "dtype": "float32"}


def test_a_checkpoint_that_is_not_whole_is_not_exported(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "step_00000001", STATE)
    (folder / "weights" / "common.pt").write_bytes(b"changed")
    message = rf"{folder} is not whole: weights/common\.pt does not match its checksum; export an"
    with pytest.raises(CheckpointError, match=message):
        run_export(folder, tmp_path / "hf")
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not whole: it has no manifest\.json"):
        run_export(folder, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("changes", [{"dtype": "os"}, {"dtype": "load"}, {"facts": None}])
def test_state_of_another_shape_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    state = {name: v for name, v in (STATE | changes).items() if v is not None}
    folder = write_checkpoint(tmp_path / "step_00000001", state)
    with pytest.raises(CheckpointError, match="does not hold the state that this run needs"):
        run_export(folder, tmp_path / "hf")


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint and has no whole one in"):
        run_export(tmp_path, tmp_path / "hf")
