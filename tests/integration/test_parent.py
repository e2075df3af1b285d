"""A run that starts from another run's checkpoint (`qlrl rl --from RUN`).

Runs: a copy of the finished one as parent; whole (the reference, two phases with a process each),
cut (killed, and started again when its parent is gone), and still (takes no update, so that its
checkpoint holds what it started with; under another layout than its parent).
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

SECTIONS: dict[str, Any] = {
    "phases": [
        {"name": "short", "max_input_tokens": 250, "steps": 2},
        {
            "name": "long",
            "max_input_tokens": 500,
            "steps": 1,
            "overrides": {"optimizer": {"lr": 1.0e-4}},
        },
    ],
    "algorithm": {"kl_coef": 0.05},
    "curriculum": {"carried_share": 0.5},
    "evaluation": {"at_phase_end": False, "every_steps": None},
    "checkpoint": {"keep": 3},
}
"""Other phases, settings and seed than the parent has; the reference counts in the loss."""


@dataclass(frozen=True)
class Family:
    """Folders of the runs. The parent's has another name by the end."""

    parent: Path
    moved: Path
    whole: Path
    cut: Path
    still: Path
    said: str
    still_said: str


@pytest.fixture(scope="module")
def family(
    finished_run: Path,
    qlrl: Any,
    start_qlrl: Any,
    kill_when: Any,
    write_config: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Family:
    folder = tmp_path_factory.mktemp("family")
    parent = folder / "parent"
    shutil.copytree(finished_run, parent)

    def config(name: str, **changes: Any) -> tuple[Path, Path]:
        sections = SECTIONS | changes | {"run": {"dir": str(folder / name / "run"), "seed": 5}}
        return write_config(folder / name, **sections), folder / name / "run"

    still, still_run = config(
        "still",
        phases=SECTIONS["phases"][:1],
        stability={"entropy_floor": "skip", "entropy_floor_nats": 1000.0},
    )
    two = ("policy.tp=2", "phases.0.steps=1", "--processes", "2")
    still_said = qlrl("rl", still, "--from", f"{parent}:4", *two).check().out
    whole, whole_run = config("whole")
    said = qlrl("rl", whole, "--from", parent).check().out
    cut, cut_run = config("cut")
    first = cut_run / "checkpoints" / "step_00000001"
    kill_when(start_qlrl("rl", cut, "--from", parent), first.is_dir)
    moved = parent.rename(folder / "gone")
    qlrl("rl", cut, "--from", parent).check()
    return Family(parent, moved, whole_run, cut_run, still_run, said, still_said)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint by name, read by torch alone."""
    state: dict[str, Any] = {}
    reader = FileSystemReader(checkpoint / "weights")
    _load_state_dict(
        state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return {name: value for name, value in _leaves(state) if isinstance(value, torch.Tensor)}


def _leaves(tree: dict[str, Any], prefix: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_child_has_the_parents_weights_and_moments(family: Family) -> None:
    """Bitwise, and under another layout."""
    before = tensors(family.moved / "checkpoints" / "step_00000004")
    after = tensors(family.still / "checkpoints" / "step_00000001")
    assert before.keys() == after.keys()
    assert sum("exp_avg" in name for name in before) > 10
    for name, tensor in before.items():
        rows = min(len(tensor), len(after[name])) if tensor.ndim else None  # tp pads a vocabulary
        assert torch.equal(tensor[:rows], after[name][:rows]), name
    step = [
        torch.load(run / "checkpoints" / name / "weights" / "common.pt", weights_only=True)
        for run, name in ((family.moved, "step_00000004"), (family.still, "step_00000001"))
    ]
    assert str(step[0]) == str(step[1])


def test_reference_is_what_the_child_starts_with(family: Family, read_jsonl: Any) -> None:
    parent = load_file(family.moved / "hf" / "model.safetensors")
    for run in (family.whole, family.cut, family.still):
        reference = load_file(run / "references" / "phase_0" / "model.safetensors")
        assert reference.keys() == parent.keys()
        assert not [name for name in parent if not torch.equal(parent[name], reference[name])]
    kl = [line["actor/kl_loss"] for line in read_jsonl(family.whole / "metrics.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-9)
    assert kl[1] > 1e-7 and kl[2] > 1e-7


def test_killed_child_ends_as_the_other_one_without_its_parent(
    family: Family, read_jsonl: Any, untimed: Any
) -> None:
    here, there = (untimed(read_jsonl(run / "metrics.jsonl")) for run in (family.whole, family.cut))
    assert [line["step"] for line in here] == [0, 1, 2]
    assert here == there
    for step in range(3):
        name = f"step_{step:06d}.jsonl"
        here, there = (run / "rollouts" / name for run in (family.whole, family.cut))
        assert here.read_bytes() == there.read_bytes(), step
    here, there = (load_file(r / "hf" / "model.safetensors") for r in (family.whole, family.cut))
    assert not [name for name in here if not torch.equal(here[name], there[name])]


def test_statistics_of_prompts_are_taken_over(family: Family, read_jsonl: Any) -> None:
    state = json.loads((family.moved / "checkpoints" / "step_00000004" / "state.json").read_text())
    seen = state["sampler"]["curriculum"]["carried"]["seen"]
    line = read_jsonl(family.whole / "metrics.jsonl")[0]
    # What the child's first step has seen itself comes on top.
    assert line["curriculum/seen_prompts"] > line["curriculum/new/drawn"] == 4
    own = json.loads((family.whole / "checkpoints" / "step_00000001" / "state.json").read_text())
    carried = own["sampler"]["curriculum"]["carried"]["seen"]
    inherited = {uid for uid, values in carried.items() if values[3] == -1}
    assert inherited and inherited <= seen.keys()
    assert f"statistics of {len(carried.keys() & seen.keys())} prompts" in family.said


def test_parent_is_on_record(family: Family) -> None:
    checkpoint = f"{family.parent}/checkpoints/step_00000004"
    assert f"qlrl: starts from {checkpoint}: its weights, its optimizer state, " in family.said
    assert f"qlrl: starts from {checkpoint}: " in family.still_said
    manifest = family.moved / "checkpoints" / "step_00000004" / "manifest.json"
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    for run, step in ((family.whole, 3), (family.cut, 3), (family.still, 1)):
        recorded = yaml.safe_load((run / "config.yaml").read_text())
        assert recorded["run"]["parent"] == f"{family.parent}:4"
        state = json.loads((run / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
        assert state["parent"] == {"run": str(family.parent), "step": 4, "manifest": digest}
        assert state["step"] == step
        card = (run / "hf" / "README.md").read_text()
        assert "a checkpoint of another run, `parent at step 4 (sha256 of" in card
        assert digest in card


def test_report_shows_the_parent_before_the_child_while_it_is_there(family: Family) -> None:
    pages = [(run / "report.html").read_text() for run in (family.whole, family.cut)]
    assert all(f'"parent":"{family.parent}, step 4"' in page for page in pages)
    assert ['"first_step":4' in page for page in pages] == [True, False]
    assert [page.count('"first_step":') for page in pages] == [2, 1]


def test_other_parent_or_model_is_refused_in_one_message(
    family: Family, qlrl: Any, write_config: Any, tmp_path: Path
) -> None:
    whole = family.whole.parent / "config.yaml"
    refused = qlrl("rl", whole, "--from", family.moved)
    assert refused.code == 2
    (message,) = refused.messages
    assert f"began from {family.parent}:4" in message
    config = write_config(tmp_path)
    refused = qlrl("rl", config, "--from", family.moved, "model.dtype=bfloat16", "--processes", "2")
    assert refused.code == 2
    (message,) = refused.messages
    assert "model.dtype: float32 -> bfloat16 must be the same" in message
    assert not (tmp_path / "run" / "config.yaml").exists()
