"""Model folders: what counts where files contradict each other; each damage is one message; and
damage at random."""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from fuzz import check_cases, mutate_bytes, mutate_json
from safetensors.numpy import save_file

from megatron_qlrl.config.folder import check_folder, find_tensors
from megatron_qlrl.config.shape import ModelShape, hf_shapes, read_shape
from megatron_qlrl.errors import CheckpointError, ConfigError, QlrlError
from tests.conftest import HF_CONFIG, write_safetensors

MakeModel = Callable[..., Path]
SHAPES = hf_shapes(ModelShape.from_hf(HF_CONFIG))


def write_index(folder: Path, files: Mapping[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": files})
    (folder / "model.safetensors.index.json").write_text(text)


def split(folder: Path) -> dict[str, str]:
    """The weights in two shards; returns the index's map."""
    (folder / "model.safetensors").unlink()
    names = list(SHAPES)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, held in parts.items():
        write_safetensors(folder / file, {name: SHAPES[name] for name in held})
    return {name: file for file, held in parts.items() for name in held}


def check(folder: Path) -> ModelShape:
    shape = read_shape(folder, rope_scaling=None)
    check_folder(folder, shape)
    return shape


def test_complete_folder_is_read(fake_hf: MakeModel) -> None:
    assert check(fake_hf()).num_layers == 6


def test_file_of_the_safetensors_library_is_accepted(fake_hf: MakeModel) -> None:
    folder = fake_hf()
    tensors = {name: np.ones(size, np.float16) for name, size in SHAPES.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert check(folder).vocab_size == 160


def test_the_index_alone_says_where_a_tensor_is(fake_hf: MakeModel) -> None:
    """A shard that an older download left, last in the alphabet, has the head in another shape."""
    folder = fake_hf()
    where = split(folder)
    write_safetensors(folder / "z.safetensors", {"model.norm.weight": (65,)})
    with pytest.raises(CheckpointError, match=r"norm\.weight' is in a.* and in z\.safetensors"):
        check(folder)
    write_index(folder, where)
    found = find_tensors(folder, check(folder))
    assert {name: file.name for name, file in found.items()} == where
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is in 'b\.safetensors', which is no file"):
        check(folder)


def test_one_file_alone_is_taken_without_an_index(fake_hf: MakeModel) -> None:
    folder = fake_hf()
    write_safetensors(folder / "adapter_model.safetensors", {"x": (1,)})
    shape = read_shape(folder, rope_scaling=None)
    assert set(find_tensors(folder, shape).values()) == {folder / "model.safetensors"}


def test_tensors_that_are_computed_or_tied_may_be_there(fake_hf: MakeModel) -> None:
    folder = fake_hf(tie_word_embeddings=True)  # and lm_head.weight is in the file
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write_safetensors(folder / "model.safetensors", SHAPES | {name: (4,)})
    assert check(folder).tied


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _pointer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer)


def _header(text: str) -> Callable[[Path], None]:
    raw = struct.pack("<Q", len(text)) + text.encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(raw + bytes(64))


def _weights(changes: Mapping[str, tuple[int, ...] | None], **kind: Any) -> Callable[[Path], None]:
    shapes = {name: size for name, size in (SHAPES | changes).items() if size is not None}
    return lambda folder: write_safetensors(folder / "model.safetensors", shapes, **kind)


def _index(weight_map: Any) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, weight_map)


def _text(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"model folder .*model does not exist; set model\.path"),
        (_drop("config.json"), r"config\.json does not exist; is .* a Hugging Face model folder"),
        (_text("config.json", "["), r"config\.json is not readable JSON"),
        (_drop("model.safetensors"), r"has no \*\.safetensors file"),
        (_cut, r"model\.safetensors is not a whole safetensors file .*download it again"),
        (_pointer, r"is not a whole safetensors file .*Git LFS"),
        (_header(""), "is not a whole safetensors file"),
        (_header("[" * 100_000), "is not a whole safetensors file"),
        (_header('{"a": {"data_offsets": 3}}'), "is not a whole safetensors file"),
        (_header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [9, 1]}}'), "is not a who"),
        (_weights({"lm_head.weight": None}), r"tensor lm_head\.weight is missing"),
        (_weights({"model.norm.weight": (65,)}), r"has shape \(65,\), config\.json asks for \(64,"),
        (_weights({}, dtype="F8_E4M3", num_bytes=1), "is of type F8_E4M3, .*dequantise"),
        (_weights({}, dtype="I8", num_bytes=1), "is of type I8, .*dequantise"),
        (_weights({"model.layers.0.mlp.up_proj.weight_scale_inv": (1,)}), "no tensor .*_scale_inv"),
        (_weights({"model.layers.6.mlp.up_proj.weight": (96, 64)}), "num_hidden_layers=6, and the "
         "weights have 7 layers"),
        (_index([]), "has no weight_map"),
        (_index(["a"]), "has no weight_map"),
        (_index({"x": 3}), "tensor 'x' is in 3, which is no file in this folder"),
        (_index({"x": "../model/config.json"}), r"is in '\.\./model/config\.json', which is no"),
        (_index({"x": "a" * 300}), "which is no file in this folder"),
        (_index({"x": "model.safetensors"}), "says that model.safetensors holds 'x', and it does"),
        (_drop("tokenizer.json"), "has no tokenizer"),
        (_text("tokenizer.json", "{}"), "cannot be read as a tokenizer: Model missing"),
        (_text("tokenizer.json", '{"version": '), r"tokenizer\.json cannot be read"),
        (_text("tokenizer_config.json", "[]"), r"tokenizer_config\.json holds a list"),
        (_text("generation_config.json", "["), r"generation_config\.json is not readable"),
        (_text("generation_config.json", '{"eos_token_id": [2, "</s>"]}'), "must be a token id or"),
        (_text("generation_config.json", '{"eos_token_id": -1}'), r"eos_token_id is \[-1\], and"),
    ],
)  # fmt: skip
def test_damaged_folder(fake_hf: MakeModel, damage: Callable[[Path], Any], message: str) -> None:
    folder = fake_hf()
    damage(folder)
    with pytest.raises(QlrlError, match=message) as caught:
        check(folder)
    assert isinstance(caught.value, ConfigError | CheckpointError)
    assert str(folder) in str(caught.value)


def test_fewer_layers_than_config_says(fake_hf: MakeModel) -> None:
    folder = fake_hf(num_hidden_layers=8)
    with pytest.raises(CheckpointError, match="=8, and the weights have 6 layers; copy"):
        check(folder)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
     "generation_config.json"],
)  # fmt: skip
def test_json_damaged_at_random(fake_hf: MakeModel, fuzz_cases: int, name: str) -> None:
    folder = fake_hf()
    write_index(folder, split(folder))
    extra = {"eos_token_id": 1, "chat_template": "x", "tokenizer_class": "Qwen2Tokenizer"}
    for file in ("tokenizer_config.json", "generation_config.json"):
        (folder / file).write_text(json.dumps(extra))
    raw = (folder / name).read_bytes()
    if name == "config.json":
        more = {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4},
                "layer_types": ["full_attention"], "head_dim": 8}  # fmt: skip
        raw = json.dumps(json.loads(raw) | more).encode()

    def damage(rng: Random) -> None:
        (folder / name).write_bytes(mutate_json(raw, rng))

    counts = check_cases(damage, lambda: check(folder), cases=fuzz_cases)
    assert counts.total() == fuzz_cases
    assert counts.keys() <= {"result", "ConfigError", "CheckpointError"}
    assert len(counts) > 1


def test_safetensors_damaged_at_random(fake_hf: MakeModel, fuzz_cases: int) -> None:
    folder = fake_hf()
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, tensors = raw[8 : 8 + size], raw[8 + size :]
    # What else a header may say, for cases that are not damage.
    header = json.dumps({"__metadata__": {str(n): "" for n in range(40)}} | json.loads(header))

    def damage(rng: Random) -> None:
        if rng.random() < 0.3:
            file.write_bytes(mutate_bytes(raw[: 8 + size], rng) + tensors)
            return
        text = mutate_json(header.encode(), rng)
        file.write_bytes(struct.pack("<Q", len(text)) + text + tensors)

    counts = check_cases(damage, lambda: check(folder), cases=fuzz_cases)
    assert counts.keys() == {"result", "CheckpointError"}
