"""Which checkpoint a run goes on from."""

from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.train.recorder import newest_checkpoint
from megatron_qlrl.weights.checkpoint import CheckpointStore
from megatron_qlrl.weights.checkpoint_folder import FORMAT

pytestmark = pytest.mark.usefixtures("lone_group")


def checkpoint_of(run: Path, **state: Any) -> Path:
    return write_checkpoint(run / "checkpoints" / "step_00000003", state)


def newest(run: Path) -> Path | None:
    store = CheckpointStore(run / "checkpoints", keep=1, warn=print)
    return newest_checkpoint(store, "rl")


def test_run_goes_on_from_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    folder = checkpoint_of(tmp_path, format=FORMAT, command="rl")
    assert newest(tmp_path) == folder


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"format": FORMAT, "command": "sft"}, "a run of `qlrl sft`, which `qlrl rl` cannot"),
        ({"format": FORMAT, "command": "import"}, "a run of `qlrl import`, which `qlrl rl` cannot"),
        ({"command": "rl"}, f"has format 1, this version of megatron_qlrl reads {FORMAT}"),
        ({"format": 99, "command": "rl"}, "has format 99"),
        (
            {"format": FORMAT},
            r"does not hold the state that this run needs \(KeyError: 'command'\)",
        ),
    ],
)
def test_run_does_not_go_on_from_another_one(
    tmp_path: Path, state: dict[str, Any], message: str
) -> None:
    checkpoint_of(tmp_path, **state)
    with pytest.raises(CheckpointError, match=message):
        newest(tmp_path)
