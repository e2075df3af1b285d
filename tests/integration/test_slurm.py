"""The batch scripts under a real Slurm of two nodes: stop, save, come back, go on; give up.

Jobs: one of two phases whose time is nearly up and that, after it came back, loses a rank to
kill -9; one that crashes at each start; one with a mistake in its settings.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from two_node_slurm import Slurm, two_node_slurm

ROOT = Path(__file__).resolve().parents[2]
TWO_NODES = ("--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")
CRASH = """
import os, signal, sys
if sys.orig_argv[2:4] == ["megatron_qlrl", "rl"]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with two_node_slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def submit(slurm: Slurm, log: Path, *argv: str | Path, **env: str) -> str:
    script = ROOT / "slurm" / "phase_rl.sh"
    return slurm.sbatch(*TWO_NODES, f"--output={log}", script, *argv, cwd=ROOT, env=env)


def rank_pid(rank: int, config: Path) -> int:
    """Process id of a rank of the run of `config`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            argv = (folder / "cmdline").read_text().split("\0")
            environ = (folder / "environ").read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        here = argv[1:5] == ["-m", "megatron_qlrl", "rl", str(config)]
        if here and f"SLURM_PROCID={rank}" in environ:
            return int(folder.name)
    raise AssertionError("no such rank")


@contextmanager
def frozen(pid: int) -> Iterator[int]:
    """A process that does not go on inside: the run is still in its step."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGCONT)


def has_pending(pid: int, number: int) -> bool:
    """Whether a frozen process has been sent a signal."""
    found = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return bool(int(found[1], 16) >> (number - 1) & 1)


@pytest.fixture(scope="module")
def cut(
    slurm: Slurm,
    write_config: Any,
    phased_sections: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """A run whose time limit came near in its first phase and that lost a rank in its second."""
    folder = tmp_path_factory.mktemp("cut")
    config, log = write_config(folder, **phased_sections), folder / "job.log"
    record = folder / "run" / "metrics.jsonl"

    def logged(step: int) -> bool:
        return record.is_file() and f'"step": {step},' in record.read_text()

    job = submit(slurm, log, config, "checkpoint.resume=false")  # of the first start alone
    slurm.wait(lambda: logged(0))
    with frozen(rank_pid(1, config)) as pid:
        # Less than the five minutes of --signal: Slurm warns when it looks next (every 30 s).
        slurm.limit(job, slurm.minutes(job) + 5)
        slurm.wait(lambda: has_pending(pid, signal.SIGUSR1))
    slurm.comes_back(job, 1, limit=60)
    saved = sorted(p.name for p in (folder / "run" / "checkpoints").iterdir())
    slurm.wait(lambda: logged(2))
    os.kill(rank_pid(1, config), signal.SIGKILL)
    slurm.comes_back(job, 2)
    ended = slurm.ended(job)
    return folder / "run", ended, log.read_text(), saved


def test_stopped_job_saves_and_comes_back(slurm: Slurm, cut: Any) -> None:
    _, ended, said, saved = cut
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "2")
    assert said.count("qlrl: asked to stop; the run is saved: the same command goes on") == 1
    # Nothing is half-written, and no step that was done is lost.
    assert saved in (["step_00000001"], ["step_00000001", "step_00000002"])
    for start in (1, 2, 3):
        assert (
            f"qlrl: job {ended['JobId']}, start {start}, on {' '.join(sorted(slurm.nodes))}\n"
            in said
        )


def test_job_that_lost_a_rank_comes_back(cut: Any) -> None:
    run, _, said, _ = cut
    assert "qlrl: failure 1 of at most 3 since the newest checkpoint" in said
    failures = json.loads((run / "failures.json").read_text())
    assert (failures["count"], failures["checkpoint"]) in ((1, f"step_0000000{n}") for n in (2, 3))


def test_both_end_like_an_uninterrupted_run(
    cut: Any, phased_run: Any, read_jsonl: Any, untimed: Any
) -> None:
    whole, ended = phased_run[0], cut[0]
    here, there = (load_file(run / "hf" / "model.safetensors") for run in (whole, ended))
    assert here.keys() == there.keys()
    assert not [name for name in here if not torch.equal(here[name], there[name])]
    here, there = (untimed(read_jsonl(run / "metrics.jsonl")) for run in (whole, ended))
    assert here == there
    for step in range(4):
        name = f"step_{step:06d}.jsonl"
        assert (whole / "rollouts" / name).read_bytes() == (ended / "rollouts" / name).read_bytes()


def test_job_that_fails_again_and_again_is_given_up(
    slurm: Slurm, write_config: Any, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    config, log = write_config(tmp_path), tmp_path / "job.log"
    job = submit(slurm, log, config, PYTHONPATH=str(tmp_path), MAX_FAILURES="2")
    slurm.comes_back(job, 1)
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), log.read_text()
    said = [line for line in log.read_text().splitlines() if line.startswith("qlrl: error: ")]
    assert len(said) == 1
    assert "failed 2 times without a new checkpoint (exit code 137) and is not started" in said[0]


def test_mistake_is_not_tried_again(slurm: Slurm, write_config: Any, tmp_path: Path) -> None:
    config, log = write_config(tmp_path), tmp_path / "job.log"
    ended = slurm.ended(submit(slurm, log, config, "policy.tp=7"))
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), log.read_text()
    assert ended["Restarts"] == "0"
    said = [line for line in log.read_text().splitlines() if line.startswith("qlrl: error: ")]
    assert len(said) == 1
    assert "policy.tp=7 does not divide" in said[0]
    assert not (tmp_path / "run" / "failures.json").exists()


SUBMIT = """
import sys

import nemo_run as run
from megatron_qlrl.launch import nemo

python, config, out = sys.argv[1:]
executor = nemo.slurm_executor(
    account="any", nodes=2, tasks_per_node=1, gpus_per_node=None, time="00:10:00",
)
commands = {
    "sft": nemo.stages(config, out, settings=["run.name=two words"])["sft"],
    "export": ["export", f"{out}/sft", f"{out}/release"],
}
with run.Experiment("tiny") as experiment:
    nemo.add_stages(experiment, executor, commands, python=python)
    experiment.run(detach=True)
"""


def test_nemo_run_submits_stages_that_wait_for_each_other(
    slurm: Slurm, nemo_python: Path, write_config: Any, toy_data: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path,
        data={"sft_files": [str(toy_data / "sft.parquet")], "eval_files": []},
        sft={"batch_size": 8, "max_steps": 2},
    )
    env = {"NEMORUN_HOME": str(tmp_path / "nemo"), "PYTHONPATH": str(ROOT)}
    slurm.run(nemo_python, "-c", SUBMIT, sys.executable, config, tmp_path, cwd=ROOT, env=env)
    found = slurm.run("squeue", "--noheader", "--format=%i %j %E", "--sort=i").splitlines()
    assert [line.split()[1] for line in found] == ["any-any.sft", "any-any.export"]
    first, second = (line.split()[0] for line in found)
    assert found[1].split()[2].startswith(f"afterok:{first}")
    logs = {job: slurm.ended(job) for job in (first, second)}
    assert [ended["JobState"] for ended in logs.values()] == ["COMPLETED"] * 2, _texts(tmp_path)
    assert "name: two words" in (tmp_path / "sft" / "config.yaml").read_text()
    here, there = (load_file(tmp_path / n / "model.safetensors") for n in ("sft/hf", "release"))
    assert not [name for name in here if not torch.equal(here[name], there[name])]


def _texts(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted((folder / "nemo").rglob("*.out")))


def test_nemo_run_writes_this_batch_script(nemo_python: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [nemo_python, "examples/nemo_run/pipeline.py", "dryrun", "c.yaml", out, "policy.tp=2"],
        cwd=ROOT,
        env=dict(os.environ)
        | {"PYTHONPATH": str(ROOT), "COLUMNS": "1000"}
        | {"ACCOUNT": "me", "NODES": "4", "CONTAINER": "image.sqsh", "MOUNTS": "/data:/data"},
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    )
    printed = re.sub(r"/qwenlong-l1_\d+", "/ID", done.stdout).replace(str(out), "OUT")
    lines = [line[11:].rstrip() for line in printed.splitlines()]  # behind the time of day
    scripts = [i for i, line in enumerate(lines) if line == "#!/bin/bash"]
    text = (ROOT / "tests/integration/golden/nemo_run_rl.sbatch").read_text()
    assert "\n".join(lines[scripts[1] :]).startswith(text)
    steps = [line.rsplit("/", 1)[1] for line in lines if line.startswith("srun ")]
    assert steps == [f"{name}.sh" for name in ("sft", "rl", "eval", "export")]
    tasks = [line for line in lines if line.startswith("#SBATCH --ntasks-per-node=")]
    assert tasks == [f"#SBATCH --ntasks-per-node={n}" for n in (8, 8, 8, 1)]


@pytest.fixture(scope="module")
def nemo_python() -> Path:
    """Python of NeMo-Run's own environment, made in .venv-launch at first use (20 s)."""
    lock, venv = ROOT / "requirements" / "launch.txt", ROOT / ".venv-launch"
    python, stamp = venv / "bin" / "python", venv / ".stamp"
    if not (stamp.is_file() and stamp.read_text() == lock.read_text()):
        install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", "--clear", venv],
            [*install, "--no-deps", "--no-compile", "-r", lock],
        ):
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
        stamp.write_text(lock.read_text())
    return python
