"""kill -9 in the middle of a step, a damaged checkpoint, another layout: the run goes on. Ctrl-C.

Runs: whole (the reference), cut (killed, its newest checkpoint damaged, started again), and a copy
of the reference that goes on under another layout.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_qlrl.errors import STOPPED

LR = 5e-4  # of write_config
STEPS = [0, 1, 1, 2, 2, 3, 3]  # evaluations after 1, 2 and 3


@pytest.fixture(scope="module")
def whole(finished_run: Path) -> Path:
    """Folder of the uninterrupted run."""
    return finished_run


@dataclass(frozen=True)
class Cut:
    """A run that was killed in a step, lost its newest checkpoint, and was started again."""

    run: Path
    torn: Path
    torn_file: str
    said: str


@pytest.fixture(scope="module")
def cut(
    qlrl: Any,
    start_qlrl: Any,
    kill_when: Any,
    write_config: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Cut:
    folder = tmp_path_factory.mktemp("cut")
    config = write_config(folder)
    record = folder / "run" / "metrics.jsonl"

    def logged() -> bool:
        return record.is_file() and '"step": 2' in record.read_text()

    # In the save of step 2's checkpoint, or in step 3.
    kill_when(start_qlrl("rl", config), logged, delay_s=random.uniform(0.0, 0.3))
    assert not (folder / "run" / "hf").exists()
    torn = sorted((folder / "run" / "checkpoints").glob("step_????????"))[-1]
    file = _flip_a_byte(torn / "weights")
    done = qlrl("rl", config).check()
    return Cut(folder / "run", torn, file.name, done.out + done.err)


def _flip_a_byte(folder: Path) -> Path:
    """Of the largest file."""
    largest = max(folder.iterdir(), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return largest


def test_torn_checkpoint_is_passed_over(cut: Cut) -> None:
    assert f"{cut.torn} is passed over: weights/{cut.torn_file} does not match" in cut.said
    before = int(cut.torn.name.removeprefix("step_")) - 1
    assert f"resuming from {cut.torn.with_name(f'step_{before:08d}')} at step {before}" in cut.said


def test_killed_run_ends_with_the_same_weights(whole: Path, cut: Cut) -> None:
    here, there = (load_file(r / "hf" / "model.safetensors") for r in (whole, cut.run))
    assert here.keys() == there.keys()
    assert not [name for name in here if not torch.equal(here[name], there[name])]


def test_weights_were_trained(whole: Path, base_model: Path) -> None:
    start, end = (load_file(f / "model.safetensors") for f in (base_model, whole / "hf"))
    moved = [name for name, tensor in end.items() if not torch.equal(tensor, start[name])]
    assert sorted(moved) == sorted(start)


def test_killed_run_samples_the_same_responses(whole: Path, cut: Cut) -> None:
    names = [f"step_{step:06d}.jsonl" for step in range(4)]
    assert sorted(p.name for p in (whole / "rollouts").iterdir()) == names
    assert sorted(p.name for p in (cut.run / "rollouts").iterdir()) == names
    for name in names:
        here, there = (run / "rollouts" / name for run in (whole, cut.run))
        assert here.read_bytes() == there.read_bytes(), name


def test_killed_run_has_the_same_record(
    whole: Path, cut: Cut, read_jsonl: Any, untimed: Any
) -> None:
    here, there = (untimed(read_jsonl(run / "metrics.jsonl")) for run in (whole, cut.run))
    assert [line["step"] for line in here] == STEPS
    assert here == there


def test_run_goes_on_in_another_layout(
    whole: Path,
    qlrl: Any,
    write_config: Any,
    base_model: Path,
    read_jsonl: Any,
    untimed: Any,
    tmp_path: Path,
) -> None:
    config = _copy(whole, tmp_path, write_config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    refused = qlrl("rl", config, "rollout.group_size=2", "policy.tp=2")
    assert refused.code == 2
    assert len(refused.messages) == 1
    assert "is of another run: rollout.group_size: 4 -> 2 (in phases.0); " in refused.messages[0]
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["rollout"]["group_size"] == 4
    done = qlrl("rl", config, "policy.tp=2").check()
    assert "qlrl: goes on with other settings: policy.tp: 1 -> 2\n" in done.out
    assert "step_00000003 at step 3" in done.out
    here, there = (read_jsonl(run / "metrics.jsonl") for run in (whole, tmp_path / "run"))
    assert untimed(there[:5]) == untimed(here[:5])
    assert [line["step"] for line in there] == STEPS
    # Sums run in another order, so the step is the same one up to rounding, which is less than a
    # hundredth of this.
    for name in ("actor/grad_norm", "actor/entropy", "prompt_length/mean"):
        assert there[5][name] == pytest.approx(here[5][name], rel=1e-3), name
    start, one, two = (
        load_file(folder / "model.safetensors")
        for folder in (base_model, whole / "hf", tmp_path / "run" / "hf")
    )
    apart = torch.cat([(two[name] - tensor).flatten() for name, tensor in one.items()])
    moved = torch.cat([(tensor - start[name]).flatten() for name, tensor in one.items()])
    # Where a gradient is all rounding, Adam may step to the other side; few weights are so.
    assert apart.abs().max() <= 2 * LR
    assert apart.norm() < 0.01 * moved.norm()


def _copy(whole: Path, folder: Path, write_config: Any) -> Path:
    """Config of a run that starts as a copy of the finished one, without its export."""
    config = write_config(folder)
    shutil.copytree(whole, folder / "run")
    shutil.rmtree(folder / "run" / "hf")
    return config


def _long_evaluation(write_config: Any, folder: Path) -> Path:
    """Config of a run that ends in an evaluation of 48,000 responses, long on any machine."""
    phase = {"name": "phase1", "max_input_tokens": 250, "steps": 2}
    return write_config(folder, phases=[phase], evaluation={"samples": 3000, "temperature": 1.0})


def _wait_for(process: Any, condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.01)


def _is_logged(folder: Path, step: int) -> bool:
    record = folder / "run" / "metrics.jsonl"
    return record.is_file() and f'"step": {step}' in record.read_text()


def test_run_is_alone_in_its_folder_and_saves_at_an_interrupt(
    start_qlrl: Any, qlrl: Any, write_config: Any, tmp_path: Path
) -> None:
    config = _long_evaluation(write_config, tmp_path)
    process = start_qlrl("rl", config)
    _wait_for(process, (tmp_path / "run" / "run.lock.1").exists)
    second = qlrl("rl", config, "--processes", "2")
    assert second.code == 2
    assert len(second.messages) == 1
    assert (
        f"run.dir {tmp_path}/run is in use by another run, process {process.pid} on"
        in (second.messages[0])
    )
    _wait_for(process, lambda: _is_logged(tmp_path, 1))
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=300)
    assert process.returncode == STOPPED, out + err
    assert "qlrl: stopping after this step; Ctrl-C again ends at once\n" in err
    assert "Traceback" not in out + err
    assert "qlrl: asked to stop; the run is saved" in out
    assert not (tmp_path / "run" / "eval").exists()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "step_00000001",
        "step_00000002",
    ]
    assert not list((tmp_path / "run").glob("run.lock*"))


def test_second_interrupt_ends_all_ranks_at_once(
    start_qlrl: Any, write_config: Any, tmp_path: Path
) -> None:
    process = start_qlrl("rl", _long_evaluation(write_config, tmp_path), "--processes", "2")
    _wait_for(process, lambda: _is_logged(tmp_path, 0))
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.killpg(process.pid, signal.SIGINT)
    line = process.stderr.readline()
    while line and "stopping after this step" not in line:
        line = process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
