"""The real command line as a subprocess, the toy data and the shipped toy model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "examples" / "quickstart" / "base"
JOB_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID")
TIMEOUT_S = 300


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `messages` are the errors it showed on stderr."""

    code: int
    out: str
    err: str

    @property
    def messages(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("qlrl: error:")]

    def check(self) -> "Outcome":
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self


def start(*argv: str | Path) -> subprocess.Popen[str]:
    """`qlrl <argv>` in a session of its own, so that all its processes can be ended together."""
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_qlrl", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in JOB_VARIABLES},
        start_new_session=True,
    )


def run(*argv: str | Path) -> Outcome:
    """`qlrl <argv>` to its end."""
    process = start(*argv)
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return Outcome(process.returncode, out, err)


@pytest.fixture(scope="session")
def qlrl() -> Callable[..., Outcome]:
    return run


@pytest.fixture(scope="session")
def start_qlrl() -> Callable[..., subprocess.Popen[str]]:
    return start


@pytest.fixture(scope="session")
def kill_when() -> Callable[..., None]:
    """Ends a running command with kill -9 as soon as `condition` holds."""

    def kill(
        process: subprocess.Popen[str], condition: Callable[[], bool], *, delay_s: float = 0.0
    ) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while process.poll() is None and not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        held = condition()
        time.sleep(delay_s)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()
        assert held, output
        assert process.returncode == -signal.SIGKILL, "the run was over before the kill"

    return kill


@pytest.fixture(scope="session")
def base_model() -> Path:
    """The shipped toy model."""
    return BASE


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the toy task's parquet files."""
    folder = tmp_path_factory.mktemp("toy")
    run("data", "toy", folder, "--train", "100", "--eval", "8").check()
    return folder


@pytest.fixture(scope="session")
def write_config(toy_data: Path) -> Callable[..., Path]:
    """Writes a complete config of a tiny run (2 phases of 2 steps); sections given replace
    single settings of it."""

    def write(folder: Path, **sections: Any) -> Path:
        config: dict[str, Any] = {
            "model": {"path": str(BASE)},
            "run": {"dir": str(folder / "run"), "seed": 3},
            "data": {
                "train_files": [str(toy_data / "train.parquet")],
                "eval_files": [str(toy_data / f"eval_{n}.parquet") for n in ("short", "long")],
            },
            "phases": [
                {"name": "phase1", "max_input_tokens": 250, "steps": 2},
                {"name": "phase2", "max_input_tokens": 1000, "steps": 2},
            ],
            "rollout": {
                "prompts_per_step": 4,
                "group_size": 4,
                "max_response_tokens": 24,
                "temperature": 1.0,
                "top_p": 1.0,
            },
            "policy": {"max_tokens_per_row": 2048},
            # Every group and the entropy count, so that weights move whatever the rewards are.
            "algorithm": {"filter_groups": False, "entropy_coef": 0.01},
            "optimizer": {"lr": 5.0e-4},
            "checkpoint": {"every_steps": 1},
            "evaluation": {"max_input_tokens": 1000, "temperature": 0, "every_steps": 3},
        }
        for name, value in sections.items():
            config[name] = config.get(name, {}) | value if isinstance(value, dict) else value
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


@pytest.fixture(scope="session")
def finished_run(
    qlrl: Callable[..., Outcome],
    write_config: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """run.dir of a whole RL run; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("finished")
    qlrl("rl", write_config(folder)).check()
    return folder / "run"


@pytest.fixture(scope="session")
def phased_sections() -> dict[str, Any]:
    """Sections for `write_config`: two phases with another layout each, for two processes."""
    overrides = {
        "policy": {"cp": 2},
        "rollout": {"prompts_per_step": 6, "group_size": 3},
        "optimizer": {"lr": 1.0e-4},
    }
    long = {"name": "long", "max_input_tokens": 500, "steps": 2, "overrides": overrides}
    return {
        "phases": [
            {"name": "short", "max_input_tokens": 250, "steps": 2},
            long | {"reference": "renew", "optimizer_state": "reset"},
        ],
        "curriculum": {"carried_share": 0.5},
        # Groups wait from step to step, in checkpoints too.
        "algorithm": {"oversampling": 1.25, "max_staleness": 4},
        "evaluation": {"at_phase_end": False, "every_steps": None},
    }


@pytest.fixture(scope="session")
def phased_run(
    qlrl: Callable[..., Outcome],
    write_config: Callable[..., Path],
    phased_sections: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Outcome]:
    """run.dir of a whole run of `phased_sections`, and how it ended."""
    folder = tmp_path_factory.mktemp("phased")
    done = qlrl("rl", write_config(folder, **phased_sections), "--processes", "2").check()
    return folder / "run", done


@pytest.fixture(scope="session")
def read_jsonl() -> Callable[[Path], list[dict[str, Any]]]:
    def read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return read


@pytest.fixture(scope="session")
def untimed() -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """A record without what differs from run to run: the times."""
    timed = ("timing_s/", "perf/")

    def without(record: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in record]

    return without


@pytest.fixture(scope="session")
def answering_model(
    qlrl: Callable[..., Any],
    write_config: Callable[..., Path],
    toy_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The toy model after a moment of SFT: it states answers, many of them wrong."""
    folder = tmp_path_factory.mktemp("answering")
    config = write_config(
        folder,
        data={"sft_files": [str(toy_data / "sft.parquet")], "eval_files": []},
        sft={"batch_size": 8, "max_steps": 20},
        optimizer={"lr": 1.0e-3},
    )
    qlrl("sft", config).check()
    return folder / "run" / "hf"


@pytest.fixture
def port() -> int:
    """A free port; of each test its own, because a killed server ends a moment later."""
    return free_port()


@pytest.fixture
def serve(
    start_qlrl: Callable[..., subprocess.Popen[str]], port: int
) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Serves a model as "toy" with `qlrl judge serve` on `port`; waits until it is ready."""
    started: list[subprocess.Popen[str]] = []

    def start(model: Path) -> subprocess.Popen[str]:
        options = ["--", "--served-model-name", "toy", "--max-model-len", "4096"]
        process = start_qlrl("judge", "serve", "--model", model, "--port", port, *options)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("judge ready"), process.communicate()[1]
        # nobody reads its log here, and a full pipe would stop it
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
