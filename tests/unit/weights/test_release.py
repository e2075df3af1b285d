"""The released folder: which files, and what config.json and the model card say."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.weights.release import base_name, copy_companions, write_release

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
        "facts": {"steps": 7}, "writer": True, "dtype": "float32", "positions": POSITIONS
    }  # fmt: skip
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
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| steps | 7 |" in card


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


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
        ("hub/models--Qwen--Qwen3-4B/snapshots/1cfa9a7208912126459214e8b04321603b3df60c",
         "Qwen/Qwen3-4B"),
        ("runs/rl/hf", "not named (set model.name)"),
        ("my model", "not named (set model.name)"),
    ],
)  # fmt: skip
def test_name_of_a_base_model_by_its_folder(tmp_path: Path, path: str, name: str) -> None:
    assert base_name(tmp_path / path) == name


def test_releases_pass_the_name_of_their_base_on(tmp_path: Path) -> None:
    release(tmp_path / "hf", base(tmp_path / "base"), facts={"base model": "Qwen/Qwen3-4B"})
    card = ModelCard.load(tmp_path / "hf" / "README.md")
    assert card.data.base_model == "Qwen/Qwen3-4B"  # pyright: ignore[reportAttributeAccessIssue]
    assert base_name(tmp_path / "hf") == "Qwen/Qwen3-4B"
    release(tmp_path / "b", base(tmp_path / "x"), facts={"base model": "not named (set it)"})
    assert "base_model" not in (tmp_path / "b" / "README.md").read_text()
    # On the card of somebody else's model it is that model's own base.
    foreign = (tmp_path / "hf" / "README.md").read_text().replace("megatron_qlrl", "theirs")
    (tmp_path / "x" / "README.md").write_text(foreign)
    assert base_name(tmp_path / "x") == "x"


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
