"""The scripts in slurm/, run by bash with stand-ins for Slurm's commands: the exact srun command
lines, and what is done about each exit code."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHARED = [
    "--nodes=1",
    "--gpus-per-node=8",
    "--ntasks-per-node=8",
    "--cpus-per-task=8",
    "--mem=0",
]
SBATCH = {
    "warmup_sft": ["--job-name=qlrl-sft", *SHARED, "--time=24:00:00", "--signal=B:USR1@300",
                   "--requeue", "--open-mode=append", "--output=%x_%j.log"],
    "phase_rl": ["--job-name=qlrl-rl", *SHARED, "--time=24:00:00", "--signal=B:USR1@300",
                 "--requeue", "--open-mode=append", "--output=%x_%j.log"],
    "evaluate": ["--job-name=qlrl-eval", *SHARED, "--time=24:00:00",
                 "--requeue", "--open-mode=append", "--output=%x_%j.log"],
    "export": ["--job-name=qlrl-export", "--nodes=1", "--ntasks=1", "--gpus-per-node=1",
               "--cpus-per-task=8", "--mem=0", "--time=04:00:00", "--output=%x_%j.log"],
}  # fmt: skip
CHECK = (
    "srun --unbuffered --cpus-per-task=8 --nodes=2 --ntasks=2 --ntasks-per-node=1 "
    "python -m megatron_qlrl slurm check {command} {config}{more} --nodes n1,n2 --tasks 16"
)
RUN = (
    "srun --unbuffered --cpus-per-task=8 --ntasks=16 --kill-on-bad-exit=0 --wait=60 "
    "python -m megatron_qlrl {command} {config}{more}"
)
AGAIN = (
    "srun --unbuffered --cpus-per-task=8 --nodes=1 --ntasks=1 "
    "python -m megatron_qlrl slurm after-failure {config}{more} --code {code} --limit 3"
)
REQUEUE = "scontrol requeue 42"
# Logs its command line; srun ends with the next exit code that the test wants.
FAKE = """#!/bin/bash
case "$(basename "$0") $1 $2" in
  "scontrol show hostnames") printf 'n1\\nn2\\n'; exit 0 ;;
  "squeue --noheader --jobs=42")
    [ "${LIMIT:-}" != fail ] || exit 1
    echo ${LIMIT:-2001-09-09T01:46:40}
    exit 0
    ;;
esac
echo "$(basename "$0") $*" >> "$LOG"
[ "$(basename "$0")" = srun ] || exit 0
echo "$MASTER_ADDR $OMP_NUM_THREADS $SLURM_JOB_END_TIME" >> "$LOG.env"
code="$(head -n 1 "$CODES")"
sed -i 1d "$CODES"
[ "$code" != wait ] || { trap 'exit 85' USR1; kill -USR1 "$PPID"; while :; do sleep 0.05; done; }
exit "$code"
"""


@dataclass
class Done:
    code: int
    calls: list[str]
    out: str


def batch(tmp_path: Path, script: str, *argv: str, codes: str, **env: str) -> Done:
    """Runs a batch script as on the first of two nodes of eight GPUs each."""
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name in ("srun", "scontrol", "squeue"):
        (fakes / name).write_text(FAKE)
        (fakes / name).chmod(0o755)
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes.split()))
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / f"{script}.sh"), *argv],
        env={
            "PATH": f"{fakes}{os.pathsep}{os.environ['PATH']}",
            "LOG": str(tmp_path / "log"),
            "CODES": str(tmp_path / "codes"),
            "SLURM_JOB_ID": "42",
            "TZ": "UTC",
            "SLURM_SUBMIT_DIR": str(submitted(tmp_path)),
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS": "16",
            "SLURM_CPUS_PER_TASK": "8",
            **env,
        },
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    log = tmp_path / "log"
    calls = log.read_text().splitlines() if log.exists() else []
    return Done(done.returncode, calls, done.stdout + done.stderr)


def submitted(tmp_path: Path) -> Path:
    """A repository without an environment of its own, which would hide the stand-ins."""
    root = tmp_path / "repository"
    (root / "my").mkdir(parents=True)
    (root / "slurm").symlink_to(ROOT / "slurm")
    return root


@pytest.mark.parametrize("script", SBATCH)
def test_sbatch_lines(script: str) -> None:
    lines = (ROOT / "slurm" / f"{script}.sh").read_text().splitlines()
    assert [line[8:] for line in lines if line.startswith("#SBATCH ")] == SBATCH[script]


@pytest.mark.parametrize(
    ("script", "command"), [("warmup_sft", "sft"), ("phase_rl", "rl"), ("evaluate", "eval")]
)
def test_nodes_are_checked_then_one_process_a_task(
    tmp_path: Path, script: str, command: str
) -> None:
    done = batch(tmp_path, script, "my", "policy.tp=2", "run.name=a b", codes="0 0")
    parts = {"command": command, "config": "my/config.yaml", "more": " policy.tp=2 run.name=a b"}
    assert done.calls == [CHECK.format(**parts), RUN.format(**parts)]
    assert done.code == 0
    assert (tmp_path / "log.env").read_text() == "n1 8 1000000000\n" * 2


@pytest.mark.parametrize(
    ("env", "ends_at"),
    [
        ({"LIMIT": "N/A"}, ""),
        ({"LIMIT": " "}, ""),
        ({"LIMIT": "fail"}, ""),
        ({"SLURM_JOB_END_TIME": "1700000000"}, "1700000000"),  # Slurm's own word
    ],
)
def test_time_limit(tmp_path: Path, env: dict[str, str], ends_at: str) -> None:
    done = batch(tmp_path, "phase_rl", "my", codes="0 0", **env)
    assert done.code == 0
    assert (tmp_path / "log.env").read_text() == f"n1 8 {ends_at}\n" * 2


@pytest.mark.parametrize(
    ("codes", "again", "requeued", "code"),
    [
        ("2", False, False, 2),  # nodes or input
        ("0 2", False, False, 2),
        ("0 85", False, True, 85),
        ("0 137 0", True, True, 137),
        ("0 137 2", True, False, 137),
        ("0 wait", False, True, 85),  # the batch script is told by USR1
    ],
)
def test_exit_codes(tmp_path: Path, codes: str, again: bool, requeued: bool, code: int) -> None:
    done = batch(tmp_path, "phase_rl", "c.yaml", codes=codes)
    parts = {"command": "rl", "config": "c.yaml", "more": "", "code": code}
    expected = [CHECK.format(**parts)]
    expected += [RUN.format(**parts)] if codes != "2" else []
    expected += [AGAIN.format(**parts)] if again else []
    expected += [REQUEUE] if requeued else []
    assert done.calls == expected, done.out
    assert done.code == code


def test_container(tmp_path: Path) -> None:
    done = batch(
        tmp_path, "export", "runs/rl", "out", codes="0", CONTAINER="i.sqsh", MOUNTS="/s:/s"
    )
    here = tmp_path / "repository"
    assert done.calls == [
        f"srun --unbuffered --cpus-per-task=8 --container-image=i.sqsh --container-workdir={here} "
        f"--container-mounts={here}:{here},/s:/s --nodes=1 --ntasks=1 "
        "python -m megatron_qlrl export runs/rl out"
    ]
    assert done.code == 0


def test_without_an_example_it_says_how(tmp_path: Path) -> None:
    done = batch(tmp_path, "phase_rl", codes="")
    assert done.code != 0 and done.calls == []
    assert "usage: sbatch [SBATCH_OPTIONS] slurm/SCRIPT.sh EXAMPLE [KEY=VALUE ...]" in done.out


# Stands for `python -m megatron_qlrl judge serve`: says what it was given, and that it is ready.
SERVER = """#!/bin/bash
echo "$*" > "$LOG"
while [ $# -gt 0 ]; do [ "$1" != --key-file ] || { (umask 077; echo k > "$2"); }; shift; done
echo "judge ready: ..."
sleep 0.3
ls -- *.url *.key > "$LOG.files" 2> /dev/null || true
"""


@pytest.mark.parametrize(
    ("env", "kept", "given", "files"),
    [
        ({}, False, " --key-file {here}/judge_42.key", ["judge_42.key", "judge_42.url"]),
        ({}, True, " --key-file {here}/judge_42.key", ["judge_42.key", "judge_42.url"]),
        ({"VLLM_API_KEY": "mine"}, False, "", ["judge_42.url"]),
    ],
)
def test_the_judge_has_a_key(
    tmp_path: Path, env: dict[str, str], kept: bool, given: str, files: list[str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(SERVER)
    (tmp_path / "bin" / "python").chmod(0o755)
    here = submitted(tmp_path)
    if kept:
        (here / "judge_42.key").write_text("earlier")
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "judge.sh"), "--max-model-len", "8192"],
        env={
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "LOG": str(tmp_path / "log"),
            "SLURM_JOB_ID": "42",
            "SLURM_SUBMIT_DIR": str(here),
            **env,
        },
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text() == (
        "-m megatron_qlrl judge serve --model Qwen/Qwen2.5-1.5B-Instruct --host 0.0.0.0 --port 8000"
        f"{given.format(here=here)} -- --max-model-len 8192\n"
    )
    assert sorted((tmp_path / "log.files").read_text().split()) == files
    assert [path.name for path in here.glob("judge_*")] == (["judge_42.key"] if kept else [])
