"""`qlrl slurm check` as two nodes would run it: two processes that meet over a real store."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]


def nodes(folders: list[Path], *, patience_s: float = 60.0) -> list[tuple[int, str]]:
    """Exit code and errors of the check on those of two nodes that come, each in its folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (
        f"from megatron_qlrl.launch import slurm; slurm.REACH_S = {patience_s}\n"
        "from megatron_qlrl.cli import main; main()"
    )
    command = ["slurm", "check", "sft", "c.yaml", "--nodes", "n0,n1", "--tasks", "2"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *command],
            cwd=folder,
            env=dict(os.environ)
            | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            | {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "SLURM_JOB_ID": "42"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    return [
        (process.returncode, "".join(f"{e}\n" for e in err.splitlines() if e.startswith("qlrl")))
        for process, err in zip(started, said, strict=True)
    ]


def write_config(folder: Path, run_dir: Path, model: Path) -> Path:
    folder.mkdir()
    row = {
        "data_source": "musique",
        "prompt": [{"role": "user", "content": "Which city?"}],
        "reward_model": {"style": "rule", "ground_truth": "Paris"},
        "response": "The answer is Paris.",
    }
    pq.write_table(pa.Table.from_pylist([row]), folder / "rows.parquet")
    (folder / "c.yaml").write_text(
        f"model: {{path: {model}, dtype: float32}}\nrun: {{dir: {run_dir}}}\n"
        "data: {sft_files: [rows.parquet]}\n"
    )
    return folder


def test_nodes_that_fit_and_one_that_does_not(tmp_path: Path, fake_hf: Callable[..., Path]) -> None:
    model, run_dir = fake_hf(), tmp_path / "run"
    first, second = (write_config(tmp_path / name, run_dir, model) for name in ("a", "b"))
    assert nodes([first, second]) == [(0, ""), (0, "")]
    assert list(run_dir.iterdir()) == []
    (second / "c.yaml").unlink()
    told = "n1: config file c.yaml does not exist; pass the path of a YAML file"
    assert nodes([first, second]) == [(2, f"qlrl: error: {told}\n"), (2, "")]


def test_run_dir_must_be_shared(tmp_path: Path, fake_hf: Callable[..., Path]) -> None:
    model = fake_hf()
    folders = [write_config(tmp_path / name, Path("run"), model) for name in ("a", "b")]
    told = "n1: does not see run.dir of n0; it must lie on a file system they share"
    assert nodes(folders) == [(2, f"qlrl: error: {told}\n"), (2, "")]


def test_node_that_does_not_come_is_named(tmp_path: Path) -> None:
    assert nodes([tmp_path], patience_s=3) == [
        (2, "qlrl: error: node n0 waited 3 s in vain for n1\n")
    ]
