"""Where `qlrl plan` takes a model's shape from; the cache is a real folder of huggingface_hub."""

import json
import socket
from pathlib import Path
from typing import NoReturn

import huggingface_hub.constants
import pytest

from megatron_qlrl.config.schema import ModelConfig
from megatron_qlrl.config.shape import ModelShape, read_json
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.plan.memory import active_parameters, stage_parameters
from megatron_qlrl.plan.shapes import SHIPPED, find_shape

QWEN_7B = "DeepSeek-R1-Distill-Qwen-7B"

# Parameters in billions, from the model cards.
PARAMETERS = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7.62,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14.77,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": 32.76,
    "Qwen/Qwen2.5-7B": 7.62,
    "Qwen/Qwen2.5-14B": 14.77,
    "Qwen/Qwen2.5-32B": 32.76,
    "Qwen/Qwen3-4B-Thinking-2507": 4.02,
    "Qwen/Qwen3-8B": 8.19,
    "Qwen/Qwen3-14B": 14.77,
    "Qwen/Qwen3-30B-A3B": 30.53,
    "Qwen/Qwen3-30B-A3B-Thinking-2507": 30.53,
    "Qwen/Qwen3-32B": 32.76,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 0.13,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a plan needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def model(path: object, **settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(path)} | settings)


def narrow(layers: int) -> str:
    """A config.json that no shipped shape equals."""
    shape = read_json(SHIPPED)[f"deepseek-ai/{QWEN_7B}"]
    return json.dumps(shape | {"num_hidden_layers": layers})


def cache(root: Path, name: str, text: str) -> Path:
    """Puts a config.json where `hf download NAME config.json` does."""
    repo = root / "hub" / f"models--{name.replace('/', '--')}"
    file = repo / "snapshots" / "abc" / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    return file


def test_shipped_shapes_have_the_published_numbers_of_parameters() -> None:
    shipped = read_json(SHIPPED)
    assert shipped.keys() == PARAMETERS.keys()
    for name, hf in shipped.items():
        num = sum(stage_parameters(ModelShape.from_hf(hf), tp=1, pp=1, stage=0))
        assert round(num / 1e9, 2) == PARAMETERS[name], name
    # The card says 3.3 B activated. By hand: embedding and head, and for each of 48 layers
    # attention, norms, router and 8 experts.
    layer = 2 * 4096 * 2048 + 2 * 512 * 2048 + 2 * 2048 + 2 * 128 + 128 * 2048 + 8 * 3 * 768 * 2048
    active = 2 * 151_936 * 2048 + 48 * layer + 2048
    assert active_parameters(ModelShape.from_hf(shipped["Qwen/Qwen3-30B-A3B"])) == active


@pytest.mark.parametrize("path", [f"models/{QWEN_7B}", f"/nowhere/{QWEN_7B}/", f"x/{QWEN_7B}"])
def test_a_folder_that_is_not_here_has_the_shipped_shape_of_its_name(path: str) -> None:
    shape, source = find_shape(model(path))
    assert (shape.num_layers, source) == (28, f"shipped for deepseek-ai/{QWEN_7B}")


def test_the_name_of_the_model_serves_where_its_folder_has_another(tmp_path: Path) -> None:
    assert find_shape(model("runs/sft/hf", name=QWEN_7B))[0].num_layers == 28
    cache(tmp_path, "me/mine", narrow(5))
    assert find_shape(model("runs/sft/hf", name="me/mine"))[0].num_layers == 5


def test_a_folder_or_a_file_wins(tmp_path: Path) -> None:
    folder = tmp_path / QWEN_7B
    folder.mkdir()
    (folder / "config.json").write_text(narrow(3))
    for path in (folder, folder / "config.json"):
        shape, source = find_shape(model(path))
        assert (shape.num_layers, source) == (3, str(folder / "config.json"))


def test_a_folder_without_config_json_is_an_error_and_no_other_model(tmp_path: Path) -> None:
    (tmp_path / QWEN_7B).mkdir()
    with pytest.raises(ConfigError, match=r"config\.json does not exist; is .* a Hugging Face"):
        find_shape(model(tmp_path / QWEN_7B))


def test_the_cache_wins_over_a_shipped_shape(tmp_path: Path) -> None:
    file = cache(tmp_path, f"deepseek-ai/{QWEN_7B}", narrow(4))
    shape, source = find_shape(model(f"deepseek-ai/{QWEN_7B}"))
    assert (shape.num_layers, source) == (4, str(file))


def test_rope_scaling_is_applied_to_every_source(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 131072}
    file = cache(tmp_path, "me/mine", narrow(4))
    for path in (f"models/{QWEN_7B}", "me/mine", file, file.parent):
        assert find_shape(model(path, rope_scaling=scaling))[0].max_positions == 262144
    wrong = {"rope_type": "dynamic"}
    with pytest.raises(ConfigError, match=f"the shape shipped for deepseek-ai/{QWEN_7B} has: rope"):
        find_shape(model(QWEN_7B, rope_scaling=wrong))


def test_what_is_not_known_is_one_message_with_the_three_ways() -> None:
    with pytest.raises(ConfigError) as caught:
        find_shape(model("models/unheard-of"))
    message = str(caught.value)
    assert message.startswith("model folder models/unheard-of does not exist")
    for way in ("a folder with a config.json", "hf download NAME config.json", QWEN_7B):
        assert way in message
    assert "\n" not in message
