"""Which checkpoint folders count: whole ones, whatever else lies beside them."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from checkpoints import seal, write_checkpoint
from fuzz import check_cases, mutate_json

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.weights.checkpoint import CheckpointStore
from megatron_qlrl.weights.checkpoint_folder import is_checkpoint, read_state, taking_up, torn

STATE = {"format": 2, "command": "rl", "step": 1, "facts": {}, "tracker": {"step": 0}}


def write(folder: Path, state: Any = STATE) -> Path:
    return write_checkpoint(folder, state)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint, and what was said of others."""
    said: list[str] = []
    return CheckpointStore(folder, keep=1, warn=said.append).newest(), said


def test_torn_checkpoints_are_recognised(tmp_path: Path) -> None:
    folder = write(tmp_path / "step_00000001")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # sha256("abc")
    (folder / "weights" / "a").write_bytes(b"abc")
    seal(folder, **{"weights/a": digest})
    assert torn(folder) is None
    (folder / "weights" / "a").write_bytes(b"abd")
    assert torn(folder) == "weights/a does not match its checksum"
    (folder / "weights" / "a").unlink()
    assert torn(folder) == "weights/a is missing"
    (folder / "manifest.json").unlink()
    assert torn(folder) == "it has no manifest.json (an interrupted save)"


Damage = Callable[[Path], object]
DAMAGES: dict[str, Damage] = {
    "manifest.json holds a list, expected an object": lambda f: (f / "manifest.json").write_text(
        "[]"
    ),
    "manifest.json does not name state.json": lambda f: (f / "manifest.json").write_text("{}"),
    "manifest.json is nested too deeply": lambda f: (f / "manifest.json").write_text("[" * 10**5),
    "JSONDecodeError": lambda f: (f / "manifest.json").write_text("{"),
    "UnicodeDecodeError": lambda f: (f / "manifest.json").write_bytes(b"\xff"),
    "Is a directory": lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()),
    "state.json does not match its checksum": lambda f: seal(f, **{"state.json": ["no text"]}),
    "state.json holds a list, expected an object": lambda f: (
        (f / "state.json").write_text("[]"),
        seal(f),
    ),
    "state.json holds a str as step, expected int": lambda f: (
        (f / "state.json").write_text(json.dumps(STATE | {"step": "1"})),
        seal(f),
    ),
    "state.json holds a list as tracker, expected dict": lambda f: (
        (f / "state.json").write_text(json.dumps(STATE | {"tracker": []})),
        seal(f),
    ),
}


@pytest.mark.usefixtures("lone_group")
@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path: Path, reason: str) -> None:
    older = write(tmp_path / "step_00000001")
    damaged = write(tmp_path / "step_00000002")
    DAMAGES[reason](damaged)
    path, said = newest(tmp_path)
    assert path == older
    (message,) = said
    assert message.startswith(f"checkpoint {damaged} is passed over: ")
    assert reason in message


@pytest.mark.usefixtures("lone_group")
def test_links_and_files_in_place_of_checkpoints(tmp_path: Path) -> None:
    """A link to a whole checkpoint is one; nothing is removed where a link points to."""
    elsewhere = write(tmp_path / "elsewhere")
    folder = tmp_path / "checkpoints"
    older = write(folder / "step_00000001")
    (folder / "step_00000002").symlink_to(elsewhere)
    (folder / "step_00000003").symlink_to(tmp_path / "nowhere")
    (folder / "step_00000004").write_text("a file")
    write(folder / "step_0000000x")  # no step of ours
    (folder / "step_00000009.tmp").symlink_to(elsewhere)
    path, said = newest(folder)
    assert path == folder / "step_00000002"
    assert [message.split(" is passed over: ")[0] for message in said] == [
        f"checkpoint {folder}/step_00000004",
        f"checkpoint {folder}/step_00000003",
    ]
    store = CheckpointStore(folder, keep=1, warn=print)
    store._remove_others(2, None)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000002", "step_0000000x"]
    assert not older.exists()
    write(folder / "step_00000003")
    store._remove_others(3, None)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000003", "step_0000000x"]
    assert torn(elsewhere) is None


def test_removal_keeps_the_newest_and_forgets_what_was_torn(tmp_path: Path) -> None:
    # Step 12 was torn, so the run resumed at 9 and now saved step 11.
    for name in ["08", "09", "11", "12", "10.tmp"]:
        (tmp_path / f"step_000000{name}").mkdir()
    (tmp_path / "notes").mkdir()
    CheckpointStore(tmp_path, keep=2, warn=print)._remove_others(11, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step_00000009", "step_00000011"]


def test_removal_spares_the_best_beside_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        (tmp_path / f"step_0000000{step}").mkdir()
    store = CheckpointStore(tmp_path, keep=1, warn=print)
    store._remove_others(8, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004", "step_00000008"]
    store._remove_others(8, 8)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000008"]


@pytest.mark.usefixtures("lone_group")
def test_a_whole_checkpoint_that_cannot_be_used_is_not_passed_over(tmp_path: Path) -> None:
    """The run would start anew, or go on from an older one, and nobody would know why."""
    write(tmp_path / "step_00000001")
    path = write(tmp_path / "step_00000002", STATE | {"format": 1})
    with pytest.raises(CheckpointError, match="has format 1, this version of .* reads 2"):
        newest(tmp_path)
    (path / "state.json").write_text(json.dumps(STATE))
    (path / "weights" / ".metadata").write_bytes(pickle.dumps(os.getcwd))
    seal(path)
    with pytest.raises(CheckpointError, match=r"\.metadata is refused: it names posix\.getcwd"):
        newest(tmp_path)


def test_values_of_another_shape_are_the_checkpoints_fault(tmp_path: Path) -> None:
    state: dict[str, Any] = {"sampler": {}}
    with (
        pytest.raises(
            CheckpointError, match=r"ckpt does not hold the state .*\(KeyError: 'phases'\)"
        ),
        taking_up(tmp_path / "ckpt"),
    ):
        state["sampler"]["phases"]


def test_what_is_a_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path / "run" / "checkpoints" / "step_00000001")
    assert is_checkpoint(folder)
    (folder / "state.json").unlink()
    assert is_checkpoint(folder)
    assert not is_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_readers_end_in_a_result_or_a_named_error(
    tmp_path: Path, fuzz_cases: int, name: str
) -> None:
    folder = write(tmp_path / "step_00000001")
    good = (folder / name).read_bytes()

    def damage(rng: Random) -> None:
        (folder / name).write_bytes(mutate_json(good, rng))

    def read() -> None:
        problem = torn(folder)
        assert problem is None or problem
        read_state(folder)

    counts = check_cases(damage, read, cases=fuzz_cases)
    assert sum(counts.values()) == fuzz_cases
