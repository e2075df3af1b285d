"""Static checks of a released folder: what passes, and what each change is called."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_qlrl.config.shape import ModelShape, hf_shapes
from megatron_qlrl.release.static import Check, static_checks
from tests.conftest import HF_CONFIG, write_safetensors

Make = Callable[..., Path]
ALL = ["files", "modes", "config", "weights", "tokenizer", "card"]
SHAPES = hf_shapes(ModelShape.from_hf(HF_CONFIG))
INDEX = "model.safetensors.index.json"


def failures(folder: Path) -> dict[str, str]:
    return {c.name: c.detail for c in static_checks(folder) if c.status == "failed"}


def only(folder: Path, name: str) -> str:
    failed = failures(folder)
    assert list(failed) == [name], failed
    return failed[name]


def shard(folder: Path, *, held: int = 2, named: int = 2) -> None:
    """The weights in two files with an index; fewer are there, or named."""
    names = sorted(SHAPES)
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for part in range(2):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        own = {name: SHAPES[name] for name in names[part::2]}
        if part < held:
            write_safetensors(folder / file, own)
        if part < named:
            weight_map |= dict.fromkeys(own, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_sound_folder_passes(release_folder: Make) -> None:
    checks = list(static_checks(release_folder()))
    assert [(c.name, c.status) for c in checks] == [(name, "ok") for name in ALL]
    assert checks[-1] == Check("card", "ok", 'base model "a/b", licence "mit", 0 result(s)')
    assert checks[0].detail.startswith("5 files, ")


def test_shards_with_their_index_pass(release_folder: Make) -> None:
    folder = release_folder()
    shard(folder)
    assert failures(folder) == {}


def test_a_missing_shard(release_folder: Make) -> None:
    folder = release_folder()
    shard(folder, held=1)
    assert "is in 'model-00002-of-00002.safetensors', which is no file" in only(folder, "weights")


def test_an_index_that_leaves_a_shard_out(release_folder: Make) -> None:
    folder = release_folder()
    shard(folder, named=1)
    assert "is missing from the safetensors files" in only(folder, "weights")


def test_a_shard_that_no_index_names(release_folder: Make) -> None:
    folder = release_folder()
    shard(folder)
    write_safetensors(folder / "model-old.safetensors", {"model.norm.weight": (64,)})
    message = only(folder, "weights")
    assert "model-old.safetensors holds 'model.norm.weight', which model" in message


def test_shards_without_an_index(release_folder: Make) -> None:
    folder = release_folder()
    shard(folder)
    (folder / INDEX).unlink()
    assert f"has 2 files of weights and no {INDEX}" in only(folder, "weights")


def test_tensors_that_the_architecture_does_not_have(release_folder: Make) -> None:
    folder = release_folder()
    write_safetensors(folder / "model.safetensors", SHAPES | {"value_head.weight": (1,)})
    assert "has no tensor 'value_head.weight'" in only(folder, "weights")
    # Old Llama folders hold this one, and a release does not.
    write_safetensors(folder / "model.safetensors", SHAPES | {"model.rotary_emb.inv_freq": (4,)})
    assert "'model.rotary_emb.inv_freq' is not one of the model" in only(folder, "weights")


def test_a_head_of_its_own_in_a_tied_model(release_folder: Make) -> None:
    folder = release_folder(tie_word_embeddings=True)
    assert "tensor 'lm_head.weight' is not one of the model" in only(folder, "weights")


def test_a_type_that_is_not_that_of_the_config(release_folder: Make) -> None:
    message = only(release_folder(dtype="bfloat16"), "weights")
    assert "is of type F32 and config.json says BF16" in message
    assert "dtype is 'int8', expected one of float32" in failures(release_folder(dtype="int8"))[
        "config"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "a.pt", "modeling.py", "notes.txt", "adapter.safetensors"]
)
def test_files_that_do_not_belong(release_folder: Make, name: str) -> None:
    folder = release_folder()
    (folder / name).write_bytes(b"\x80\x04.")
    assert f"{folder / name} does not belong in a release" in failures(folder)["files"]


def test_a_pickle_with_a_good_name(release_folder: Make) -> None:
    folder = release_folder()
    (folder / "model.safetensors").write_bytes(b"\x80\x04\x95" + b"x" * 100)
    assert "is not a whole safetensors file" in only(folder, "weights")


def test_folders_and_links_do_not_belong(release_folder: Make, tmp_path: Path) -> None:
    folder = release_folder()
    (folder / "code").mkdir()
    assert "code does not belong" in only(folder, "files")
    (folder / "code").rmdir()
    (tmp_path / "key").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "key")
    assert "LICENSE is a link" in only(folder, "files")


def test_notes_of_the_hubs_client_are_passed_over(release_folder: Make) -> None:
    folder = release_folder()
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "a.metadata").write_text("")
    assert failures(folder) == {}


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (0o600, r"has mode 600 and other files 644"),
        (0o755, r"is executable (mode 755); chmod 644 it"),
        (0o044, r"cannot be read (mode 44); chmod 644 it"),
    ],
)
def test_modes(release_folder: Make, mode: int, message: str) -> None:
    folder = release_folder()
    for file in folder.iterdir():
        file.chmod(0o644)
    (folder / "config.json").chmod(mode)
    assert message in failures(folder)["modes"]


def test_a_folder_for_its_owner_alone_passes(release_folder: Make) -> None:
    folder = release_folder()
    for file in folder.iterdir():
        file.chmod(0o600)
    assert failures(folder) == {}


def test_code_from_the_repository_is_refused(release_folder: Make) -> None:
    folder = release_folder(auto_map={"AutoModel": "modeling.Model"})
    assert "has auto_map, which loads code" in only(folder, "config")


def test_a_folder_without_chat_template(release_folder: Make) -> None:
    folder = release_folder()
    (folder / "chat_template.jinja").unlink()
    assert "has no chat template" in only(folder, "tokenizer")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert failures(folder) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\n{broken\n---\n", "is no model card"),
        ("---\n- a\n---\n", "is no model card"),
        ("---\nmodel-index: [{}]\n---\n", "is no model card"),
        ("# only text\n", "has no YAML above its text"),
    ],
)
def test_cards_that_the_hub_would_refuse(release_folder: Make, text: str, message: str) -> None:
    folder = release_folder()
    (folder / "README.md").write_text(text)
    assert message in only(folder, "card")


def test_no_folder_at_all(tmp_path: Path) -> None:
    failed = failures(tmp_path / "nowhere")
    assert list(failed) == ALL
    assert "is no folder" in failed["files"]
