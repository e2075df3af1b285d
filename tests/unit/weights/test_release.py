"""The released folder: which files, and what config.json and the model card say."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.weights.release import copy_companions, write_release

pytestmark = pytest.mark.usefixtures("lone_group")


CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "torch_dtype": "bfloat16",
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "vocab_size": 3,
}
POSITIONS = {
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
WEIGHTS = {"model.norm.weight": torch.tensor([1.0, 2.0])}


def base(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"t": 1}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(b"old weights")
    (folder / "notes.txt").write_text("private")
    return folder


def release(out: Path, companions: Path, **changes: Any) -> None:
    stream: Any = WEIGHTS.items()
    settings: dict[str, Any] = {
        "card": lambda folder: f"# {folder.name}\n",
        "writer": True,
        "dtype": "float32",
        "positions": POSITIONS,
    }
    write_release(stream, out, companions=companions, **(settings | changes))


def test_folder_holds_weights_config_tokenizer_and_card(tmp_path: Path) -> None:
    release(tmp_path / "out", base(tmp_path / "base"))
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert torch.equal(load_file(out / "model.safetensors")["model.norm.weight"], WEIGHTS[
        "model.norm.weight"
    ])  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    want = {k: v for k, v in CONFIG.items() if k != "torch_dtype"} | {"dtype": "float32"}
    assert config == want | POSITIONS
    assert (out / "README.md").read_text() == "# out\n"


def test_released_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        release(tmp_path / "out", base(tmp_path / "base"))
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 5
    assert set(modes.values()) == {0o640}, modes


def test_index_of_an_older_release_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors.index.json").write_text("{}")
    release(tmp_path / "out", base(tmp_path / "base"))
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_positions_of_the_run_replace_the_models(tmp_path: Path) -> None:
    """In the words of transformers 4 and 5, of which each ignores the other's."""
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    positions = {"max_position_embeddings": 1024, "rope_parameters": rope}
    release(tmp_path / "out", base(tmp_path / "base"), positions=positions)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["max_position_embeddings"] == 1024
    assert config["rope_parameters"] == config["rope_scaling"] == rope
    assert config["rope_theta"] == 1e6


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    release(tmp_path / "out", base(tmp_path / "base"), writer=False)
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file is in the way")
    with pytest.raises(CheckpointError, match="cannot write the model folder"):
        release(tmp_path / "out", base(tmp_path / "base"))


def test_companions_leave_weights_and_other_files(tmp_path: Path) -> None:
    copy_companions(base(tmp_path / "base"), tmp_path / "a/b", dtype="float32", positions=POSITIONS)
    names = {p.name for p in (tmp_path / "a/b").iterdir()}
    assert names == {"config.json", "tokenizer.json", "chat_template.jinja"}
