"""Bad input ends with exit code 2 and one message that says what, where and how to mend it."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_qlrl.errors import STOPPED

BROKEN_YAML = {
    "list.yaml": ("- model\n- run\n", ["list.yaml", "expected sections", "found a list"]),
    "cut.yaml": ("model: {path: x\n", ["cut.yaml", "line"]),
    "latin.yaml": (b"run: {name: caf\xe9}\n", ["latin.yaml", "utf-8"]),
    "empty.yaml": ("", ["empty.yaml", "'model' is required"]),
    "twice.yaml": ("model: {path: x}\nmodel: {path: y}\n", ["twice.yaml", "duplicate key model"]),
}

WRONG_SETTINGS = [
    (["rollout.group_sise=4"], ["'rollout.group_sise'", "did you mean 'group_size'?"]),
    (["rollout.group_size=-1"], ["rollout.group_size", "greater than 0", "-1"]),
    (["rollout.top_p=1.5"], ["rollout.top_p", "less than or equal to 1", "1.5"]),
    (["rollout.prompts_per_step=3.5"], ["rollout.prompts_per_step", "valid integer", "3.5"]),
    (["optimizer.lr=.inf"], ["optimizer.lr", "finite"]),
    (["algorithm.updates_per_step=3"], ["algorithm.updates_per_step=3", "must divide", "=4"]),
    (["algorithm.kl_coef=0.1", "algorithm.reference_every=2"], ["reference_every=2 needs", "=0"]),
    (["policy.max_tokens_per_row=900"], ["policy.max_tokens_per_row=900", "1000 + 24", "1024"]),
    (["phases.0.max_input_tokens=2000"], ["max_input_tokens must grow", "[2000, 1000]"]),
    (["phases.7.steps=1"], ["'phases.7.steps=1'", "out of range"]),
    (["data.train_files=x.parquet"], ["data.train_files", "expected a list"]),
    (["data.train_files=[/nowhere/x.parquet]"], ["do not exist", "/nowhere/x.parquet"]),
    (["data.train_files=[]"], ["needs data.train_files"]),
    (["policy.tp"], ["'policy.tp' is not of the form section.key=value"]),
    (["=3"], ["'=3' is not of the form section.key=value"]),
    (["policy.tp=3"], ["policy.tp=3", "num_attention_heads=2", "valid values: 1, 2"]),
    (["policy.pp=3"], ["policy.pp=3", "num_hidden_layers=2", "valid values: 1, 2"]),
    (["policy.tp=2", "--processes=3"], ["3 processes", "policy.tp=2", "multiple of 2"]),
    (["rollout.tp=2", "--processes=1"], ["rollout.tp=2", "1 processes", "valid values: 1"]),
    (["model.path=/nowhere"], ["/nowhere does not exist", "set model.path"]),
    (["rollout.max_response_tokens=9000", "policy.max_tokens_per_row=10000"], ["4096 positions"]),
    (["run.dir=/dev/null/run"], ["run.dir", "/dev/null: Not a directory"]),
]


def fails(done: Any, expected: list[str]) -> None:
    """Exit code 2, one message that holds the expected texts, no stack trace."""
    assert done.code == 2, done
    assert len(done.messages) == 1, done.err
    assert "Traceback" not in done.out + done.err
    for text in expected:
        assert text in done.err, done.err


@pytest.fixture(scope="module")
def config(write_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize("arguments, expected", WRONG_SETTINGS, ids=lambda v: " ".join(v)[:40])
def test_wrong_settings(qlrl: Any, config: Path, arguments: list[str], expected: list[str]) -> None:
    fails(qlrl("rl", config, *arguments), expected)


@pytest.mark.parametrize("name", BROKEN_YAML)
def test_broken_config_file(qlrl: Any, tmp_path: Path, name: str) -> None:
    content, expected = BROKEN_YAML[name]
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
    fails(qlrl("rl", tmp_path / name), expected)


def test_mistakes_are_found_without_torch(
    qlrl: Any, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # lists every import on stderr
    done = qlrl("rl", config, "policy.tp=3")
    fails(done, ["policy.tp=3"])
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.err.splitlines()}
    assert "pydantic" in imported
    assert not imported & {"torch", "vllm", "transformers", "megatron"}


def test_model_folder_without_weights(
    qlrl: Any, config: Path, base_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(base_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    expected = [f"model folder {tmp_path}/model has no *.safetensors", "download the weights"]
    fails(qlrl("rl", config, f"model.path={tmp_path}/model"), expected)


def test_weights_cut_short(qlrl: Any, config: Path, base_model: Path, tmp_path: Path) -> None:
    shutil.copytree(base_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    fails(qlrl("rl", config, f"model.path={tmp_path}/model"), [str(file), "download it again"])


def _with_row_7(toy_data: Path, path: Path, **changes: Any) -> Path:
    table = pq.read_table(toy_data / "train.parquet").slice(0, 20)
    rows = table.to_pylist()
    rows[7] |= changes
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return path


def test_row_without_question(qlrl: Any, config: Path, toy_data: Path, tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Answer."}]
    file = _with_row_7(toy_data, tmp_path / "rows.parquet", prompt=prompt, question=None)
    expected = [f"{file}, row 7", "there is no question", "fill the column `question`"]
    fails(qlrl("rl", config, f"data.train_files=[{file}]"), expected)


def test_no_prompt_fits_a_phase(qlrl: Any, config: Path, toy_data: Path, tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "word " * 3000}]
    file = _with_row_7(toy_data, tmp_path / "rows.parquet", prompt=prompt)
    table = pq.read_table(file)
    pq.write_table(table.slice(7, 1), tmp_path / "only.parquet")
    expected = ["1 of 1 prompts", "only:0", "(1000 tokens)", "Nothing is left: raise"]
    fails(qlrl("rl", config, f"data.train_files=[{tmp_path}/only.parquet]"), expected)


def test_unknown_data_source_on_two_ranks_is_one_message(
    qlrl: Any, config: Path, toy_data: Path, tmp_path: Path
) -> None:
    file = _with_row_7(toy_data, tmp_path / "rows.parquet", data_source="mystery")
    done = qlrl("rl", config, f"data.train_files=[{file}]", "--processes", "2")
    fails(done, ["no reward rule for data_source 'mystery' (1 rows)", "musique", "Rename"])
    assert done.err.count("mystery") == 1


def test_sft_file_without_responses(qlrl: Any, config: Path, toy_data: Path) -> None:
    file = toy_data / "train.parquet"
    expected = [f"{file} has no column response", "found data_source, prompt"]
    fails(qlrl("sft", config, f"data.sft_files=[{file}]"), expected)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB: room for two checkpoints (2.5 MB each) of the toy model, not three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(qlrl: Any, write_config: Any, small_disk: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, run={"dir": str(small_disk / "run")})
    done = qlrl("rl", config)
    fails(done, [str(small_disk), "last good checkpoint is untouched", "the run resumes"])
    folder = small_disk / "run" / "checkpoints"
    kept = sorted(p.name for p in folder.iterdir())
    assert kept == ["step_00000001", "step_00000002"]
    qlrl("export", small_disk / "run", tmp_path / "hf").check()
    assert json.loads((folder / kept[-1] / "state.json").read_text())["step"] == 2
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_interrupt_leaves_no_process(start_qlrl: Any, write_config: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    process = start_qlrl("rl", config, "--processes", "2", "phases.1.steps=10000")
    children: list[int] = []
    deadline = time.monotonic() + 120
    while len(children) < 2 and process.poll() is None and time.monotonic() < deadline:
        children = _children(process.pid)
        time.sleep(0.05)
    record = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if record.is_file() and record.stat().st_size:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == STOPPED, (out, err)  # saved, as at any signal that asks it to
    assert len(children) == 2
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
