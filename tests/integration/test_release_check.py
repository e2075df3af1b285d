"""`qlrl release check` with the real engines: a run's own folder passes, changed copies do not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

CHECKS = (
    "files", "modes", "config", "weights", "tokenizer", "card",
    "config and tokenizer, byte for byte", "weights, byte for byte",
    "vLLM", "transformers", "log-probs", "greedy answers",
)  # fmt: skip


def test_a_runs_own_folder_passes_all(qlrl: Any, finished_run: Path) -> None:
    done = qlrl("release", "check", finished_run / "hf", "--json").check()
    results = json.loads(done.out)
    assert [(r["name"], r["status"]) for r in results] == [(name, "ok") for name in CHECKS]


def _flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _lose_a_shard(folder: Path) -> None:
    """A folder of two shards, one of which is missing."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2],
              "model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard, {"format": "pt"})
        (folder / shard).chmod(0o644)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()


def _add_a_pickle(folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")


def _change_the_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


@pytest.mark.parametrize(
    ("tamper", "check", "message"),
    [
        (_lose_a_shard, "weights",
         "is in 'model-00002-of-00002.safetensors', which is no file in this folder"),
        (_flip, "weights, byte for byte", "differs from the checkpoint's in 1 of"),
        (_change_the_template, "config and tokenizer, byte for byte",
         "chat_template.jinja differs from"),
        (_add_a_pickle, "files", "pytorch_model.bin does not belong in a release"),
    ],
)  # fmt: skip
def test_a_changed_copy_fails(
    qlrl: Any,
    finished_run: Path,
    tmp_path: Path,
    tamper: Callable[[Path], None],
    check: str,
    message: str,
) -> None:
    shutil.copytree(finished_run / "hf", tmp_path / "copy")
    tamper(tmp_path / "copy")
    done = qlrl("release", "check", tmp_path / "copy", "--checkpoint", finished_run)
    assert done.code == 1, done.err
    failed = [line for line in done.out.splitlines() if line.startswith("failed")]
    assert len(failed) == 1
    assert failed[0].startswith(f"failed   {check}: ") and message in failed[0]
    assert "vLLM" not in done.out  # nothing was started for a folder that is wrong


def test_another_rotation_of_positions_is_seen(
    qlrl: Any, finished_run: Path, tmp_path: Path
) -> None:
    """transformers 4 and 5 read RoPE under two names. vLLM is told another base here, as by a
    version that reads another one of them."""
    options = ["--", "--hf-overrides", json.dumps({"rope_parameters": {
        "rope_type": "default", "rope_theta": 3e4}})]  # fmt: skip
    shutil.copytree(finished_run / "hf", tmp_path / "copy")
    done = qlrl("release", "check", tmp_path / "copy", *options)
    assert done.code == 1, done.out
    assert "skipped  checkpoint: no checkpoint at hand" in done.out
    assert "failed   log-probs: vLLM and transformers disagree about this folder" in done.out
