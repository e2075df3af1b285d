"""Checks that a Hugging Face folder is complete and holds one model, from the headers of its files
and without torch."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from megatron_qlrl.config.shape import ModelShape, hf_shapes, read_json, short
from megatron_qlrl.errors import CheckpointError, ConfigError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a model folder holds beside its weights."""
FLOATS = ("F64", "F32", "F16", "BF16")

_LAYER = re.compile(r"model\.layers\.(\d{1,6})\..+")
# Old Llama folders hold what is computed from the config.
_COMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_AGAIN = "download the model again"


def check_folder(folder: str | Path, shape: ModelShape) -> None:
    """Checks that the folder holds all weights of a model of this shape, and its tokenizer.

    Raises:
        ConfigError, CheckpointError: as `find_tensors`, `check_tokenizer`.
    """
    find_tensors(Path(folder), shape)
    check_tokenizer(Path(folder))


def find_tensors(folder: Path, shape: ModelShape) -> dict[str, Path]:
    """Returns the file of each of the model's tensors. If there is an index, it alone decides, so
    that a file that an older download left is not read.

    Raises:
        CheckpointError: a file or a tensor is missing or damaged, or the tensors are not those
            of the model that config.json describes.
    """
    where: dict[str, Path] = {}
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file, names in weight_files(folder).items():
        held = dict(header(file))
        lacking = sorted(names - held.keys()) if names else []
        if lacking:
            raise CheckpointError(
                f"{folder / INDEX} says that {file.name} holds {short(lacking[0])}, and it "
                f"does not; {_AGAIN}"
            )
        for name in names or held:
            if name in where:
                raise CheckpointError(
                    f"{folder}: tensor {short(name)} is in {where[name].name} and in {file.name}, "
                    f"and no {INDEX} says which one counts; remove the file that does not belong"
                )
            where[name], seen[name] = file, held[name]
    _compare(folder, shape, seen)
    return where


def check_tokenizer(folder: Path) -> None:
    """Checks that the tokenizer's files are there and can be read.

    Raises:
        ConfigError: there are no such files, or one is damaged.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"model folder {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the "
            "tokenizer files of the model into it"
        )
    if (folder / "tokenizer_config.json").is_file():
        read_json(folder / "tokenizer_config.json")
    end_tokens(folder)
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises this class itself
            raise ConfigError(
                f"{file} cannot be read as a tokenizer: {error}; copy the file of the model again"
            ) from error


def end_tokens(folder: Path) -> list[int]:
    """Returns the end tokens of generation_config.json, or none without the file.

    Raises:
        ConfigError: the file names something else than token ids.
    """
    file = folder / "generation_config.json"
    ids: Any = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = cast("list[Any]", ids) if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ConfigError(
            f"{file}: eos_token_id is {short(ids)}, and must be a token id or a list of them; copy "
            "the file of the model again"
        )
    return ids


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """Returns the files of a model folder's weights, each with the names of the tensors to take
    from it; an empty set takes all. If there is an index, it alone decides.

    Raises:
        CheckpointError: there is no such file, or the index is damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        alone = folder / "model.safetensors"
        all_held = [alone] if alone.is_file() else sorted(folder.glob("*.safetensors"))
        if not all_held:
            raise CheckpointError(
                f"model folder {folder} has no *.safetensors file; download the weights in "
                "safetensors format (.bin and .pt files are not read)"
            )
        return {file: set() for file in all_held}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensors to files; {_AGAIN}")
    here = {file.name for file in folder.iterdir() if file.is_file()}
    files: dict[Path, set[str]] = {}
    for tensor, name in cast("dict[str, Any]", weight_map).items():
        if not isinstance(name, str) or name not in here:
            raise CheckpointError(
                f"{index}: tensor {short(tensor)} is in {short(name)}, which is no file in this "
                f"folder; {_AGAIN}"
            )
        files.setdefault(folder / name, set()).add(tensor)
    return files


def header(file: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yields the name of each tensor in a safetensors file with its type and shape.

    Raises:
        CheckpointError: it is no whole safetensors file.
    """
    try:
        opened: Any = safe_open(file, framework="numpy")
        with opened as tensors:
            for name in tensors.keys():  # noqa: SIM118
                piece = tensors.get_slice(name)
                yield name, (piece.get_dtype(), tuple(piece.get_shape()))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}); it may be cut short, or a Git LFS "
            f"pointer: download it again"
        ) from error


def _compare(
    folder: Path, shape: ModelShape, seen: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Checks that these are the tensors of `shape`."""
    layers = {int(match[1]) for name in seen if (match := _LAYER.fullmatch(name))}
    if layers and max(layers) + 1 != shape.num_layers:
        raise CheckpointError(
            f"{folder}: config.json has num_hidden_layers={shape.num_layers}, and the weights have "
            f"{max(layers) + 1} layers; copy config.json and the weights of one and the same model"
        )
    allowed = hf_shapes(shape.untied)
    unknown = sorted(n for n in seen if n not in allowed and not _COMPUTED.fullmatch(n))
    if unknown:
        raise CheckpointError(
            f"{folder}: the model that config.json describes has no tensor {short(unknown[0])} "
            f"({len(unknown)} such); use a folder of that model alone, not quantised, without "
            "adapters"
        )
    for name, size in hf_shapes(shape).items():
        if name not in seen:
            raise CheckpointError(
                f"{folder}: tensor {name} is missing from the safetensors files; {_AGAIN}"
            )
        dtype, held = seen[name]
        if held != size:
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {held}, config.json asks for {size}; copy "
                "config.json and the weights of one and the same model"
            )
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{folder}: tensor {name} is of type {dtype}, and weights are trained in "
                f"{', '.join(FLOATS)}; dequantise the model first, or download the original"
            )
