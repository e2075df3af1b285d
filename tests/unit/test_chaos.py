"""What tools/chaos.py calls wrong: without these its verdict would mean nothing."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

from tools.chaos import Failed, check_start, damage, differences, newest, waiting_responses


def finished(folder: Path, *, weights: bytes = b"w", rollouts: str = "r", **metrics: Any) -> Path:
    """What is left of a run of two steps."""
    for name in ("hf", "rollouts"):
        (folder / name).mkdir(parents=True)
    (folder / "hf" / "model.safetensors").write_bytes(weights)
    (folder / "rollouts" / "step_0.jsonl").write_text(rollouts)
    lines = ({"step": step, "actor/loss": 0.5} | metrics for step in range(2))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"timing_s/step": 3.0}, []),
        ({"weights": b"v"}, ["hf/model.safetensors"]),
        ({"rollouts": "q"}, ["rollouts/step_0.jsonl"]),
        ({"actor/loss": 0.25}, ["metrics.jsonl"]),
    ],
)
def test_difference_to_the_reference_is_named(
    tmp_path: Path, changes: dict[str, Any], found: list[str]
) -> None:
    reference = finished(tmp_path / "reference", **{"timing_s/step": 2.0})
    assert differences(finished(tmp_path / "run", **changes), reference) == found


def test_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for step in (3, 4):
        write_checkpoint(tmp_path / "checkpoints" / f"step_{step:08d}", {"step": step})
    assert newest(tmp_path) == 4
    (tmp_path / "checkpoints" / "step_00000004" / "state.json").write_text("{}")
    assert newest(tmp_path) == 3


@pytest.mark.parametrize(
    ("resumed", "whole", "spoiled"), [(None, None, None), (4, 4, None), (2, 2, 4), (None, None, 2)]
)
def test_right_start(resumed: int | None, whole: int | None, spoiled: int | None) -> None:
    check_start(resumed, whole, spoiled)


@pytest.mark.parametrize(
    ("resumed", "whole", "spoiled", "reason"),
    [
        (4, 2, 4, "a checkpoint that was damaged"),
        (4, 4, 4, "a checkpoint that was damaged"),  # its checksums do not tell
        (2, 4, None, "resumed at 2, but the newest whole checkpoint was 4"),
        (None, 4, None, "resumed at None, but the newest whole checkpoint was 4"),
    ],
)
def test_wrong_start(resumed: int | None, whole: int | None, spoiled: int | None, reason: str):
    with pytest.raises(Failed, match=reason):
        check_start(resumed, whole, spoiled)


@pytest.mark.parametrize("blow", ["flip", "cut"])
def test_damage_changes_one_file(tmp_path: Path, blow: str) -> None:
    contents = {"weights.bin": b"\x00" * 9, "state.json": b"{}", "empty": b""}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    hurt = damage(tmp_path, blow, random.Random(0))
    after = {name: (tmp_path / name).read_bytes() for name in contents}
    assert [name for name in contents if after[name] != contents[name]] == [hurt.name]
    before, now = contents[hurt.name], after[hurt.name]
    if blow == "cut":
        assert before.startswith(now)
        assert len(now) < len(before)
    else:
        flipped = [a ^ b for a, b in zip(before, now, strict=True)]
        assert sum(bits.bit_count() for bits in flipped) == 1


def test_responses_that_wait_in_a_checkpoint_are_counted(tmp_path: Path) -> None:
    groups = [{"responses": [{"goes_on": on} for on in kinds]} for kinds in ((1, 0, 1), (0,), (1,))]
    state = {"format": 2, "sampler": {"waiting": groups}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert waiting_responses(tmp_path) == 3
