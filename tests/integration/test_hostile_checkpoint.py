"""A checkpoint or model folder that would run code where it is read: the real commands run nothing
of it, and end in one message."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Payload, entry, pickled_file, seal, state, tampered, text
from test_bad_input import fails

EXTRA = "decoder.layers.mlp.linear_fc2._extra_state/shard_0_2"


@pytest.fixture(scope="module")
def good(qlrl: Any, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    qlrl("import", base_model, folder / "out").check()
    return folder / "out" / "checkpoints" / "step_00000000"


def test_export(qlrl: Any, good: Path, tmp_path: Path) -> None:
    payload = Payload(tmp_path / "marker")
    attacks = {
        ".metadata is refused: it names posix.mkdir": pickled_file(".metadata", payload),
        "common.pt is refused": pickled_file("common.pt", payload),
        f"what it holds as {EXTRA} is no tensor": entry(EXTRA, [payload]),
        "state.json holds a list": text("state.json", "[]"),
    }
    for number, (message, tamper) in enumerate(attacks.items()):
        path = tampered(good, tmp_path / f"attack_{number}", tamper)
        fails(qlrl("export", path, tmp_path / "hf"), [str(path), message])
        assert not (tmp_path / "marker").exists(), message
        assert not (tmp_path / "hf").exists(), message


@pytest.mark.parametrize("command", ["rl", "sft"])
def test_resume(
    qlrl: Any, write_config: Any, toy_data: Path, good: Path, tmp_path: Path, command: str
) -> None:
    """Also on two ranks one message, before the engine starts."""
    config = write_config(tmp_path, data={"sft_files": [str(toy_data / "sft.parquet")]})
    path = tmp_path / "run" / "checkpoints" / "step_00000001"
    tampered(good, path, pickled_file(".metadata", Payload(tmp_path / "marker")))
    state(command=command)(path)
    seal(path)
    done = qlrl(command, config, "--processes", "2")
    fails(done, [f"{path}/weights/.metadata is refused: it names posix.mkdir"])
    assert not (tmp_path / "marker").exists()


def test_import_and_eval(
    qlrl: Any, write_config: Any, base_model: Path, good: Path, tmp_path: Path
) -> None:
    """They read Hugging Face folders, of these only safetensors, and no checkpoint."""
    model = tmp_path / "model"
    shutil.copytree(base_model, model)
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl"):
        (model / name).write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    qlrl("import", model, tmp_path / "out").check()
    (model / "model.safetensors").unlink()
    config = write_config(tmp_path)
    for folder, message in {model: "has no *.safetensors", good: "config.json"}.items():
        fails(qlrl("import", folder, tmp_path / "other"), [str(folder), message])
        fails(qlrl("eval", config, f"model.path={folder}"), [str(folder), message])
    assert not (tmp_path / "marker").exists()
