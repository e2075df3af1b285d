"""What can be said of a model folder without loading the model, and without torch."""

import json
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_qlrl.config.folder import COMPANIONS, INDEX, check_tokenizer, find_tensors, header
from megatron_qlrl.config.shape import hf_shapes, read_json, read_shape, short
from megatron_qlrl.errors import QlrlError, ReleaseError

_OTHERS = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", ".gitattributes", INDEX)
_NEVER_SENT = (".git", ".cache")
"""Folders of git and of huggingface_hub's own notes: neither loaded nor uploaded."""
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WRITE_AGAIN = "write the folder again (qlrl export)"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `detail` says what holds, or what does not and how to mend."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str


def run_check(name: str, check: Callable[[], str]) -> Check:
    """Runs a check, which returns what holds or raises what does not."""
    try:
        return Check(name, "ok", check())
    except QlrlError as error:
        return Check(name, "failed", str(error))
    except OSError as error:
        return Check(name, "failed", f"{error}; make it readable, or {_WRITE_AGAIN}")


def static_checks(folder: Path) -> Iterator[Check]:
    """Checks files, modes, config, weights, tokenizer and card of a model folder."""
    checks: dict[str, Callable[[Path], str]] = {
        "files": _files,
        "modes": _modes,
        "config": _config,
        "weights": _weights,
        "tokenizer": _tokenizer,
        "card": _card,
    }
    for name, check in checks.items():
        yield run_check(name, lambda check=check: check(folder))


def release_files(folder: Path) -> list[Path]:
    """Returns the files of a release, in order.

    Raises:
        ReleaseError: the folder holds something else, which may run code where it is loaded, or
            would be uploaded by mistake.
    """
    if not folder.is_dir():
        raise ReleaseError(f"{folder} is no folder; name the Hugging Face folder of a release")
    files = sorted(f for f in folder.iterdir() if f.name not in _NEVER_SENT)
    for file in files:
        if file.is_symlink():
            raise ReleaseError(f"{file} is a link; put the file itself in its place")
        known = file.name in (*COMPANIONS, *_OTHERS) or (
            file.suffix == ".safetensors" and file.name.startswith("model")
        )
        if not known or not file.is_file():
            raise ReleaseError(
                f"{file} does not belong in a release: it holds safetensors, config, tokenizer, "
                "card and licence alone, for pickles (.bin, .pt, .pkl) and code (.py) run where "
                "they are loaded; move it elsewhere"
            )
    return files


def _files(folder: Path) -> str:
    files = release_files(folder)
    size = sum(f.stat().st_size for f in files)
    return f"{len(files)} files, {size / 1e6:,.1f} MB; no pickle, no code"


def _modes(folder: Path) -> str:
    modes = {f: stat.S_IMODE(f.stat().st_mode) for f in sorted(folder.iterdir()) if f.is_file()}
    if not modes:
        raise ReleaseError(f"{folder} has no files; {_WRITE_AGAIN}")
    common = max(modes.values(), key=list(modes.values()).count)
    for file, mode in modes.items():
        if not mode & stat.S_IRUSR:
            raise ReleaseError(f"{file} cannot be read (mode {mode:o}); chmod 644 it")
        if mode & 0o111:
            raise ReleaseError(f"{file} is executable (mode {mode:o}); chmod 644 it")
        if mode & 0o044 != common & 0o044:
            raise ReleaseError(
                f"{file} has mode {mode:o} and other files {common:o}: not everybody who may read "
                f"those may read it; chmod {common:o} it"
            )
    return f"{common:o}"


def _config(folder: Path) -> str:
    shape = read_shape(folder, rope_scaling=None)
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_json(folder / name):
            raise ReleaseError(
                f"{folder / name} has auto_map, which loads code from the repository; remove it: "
                "the supported architectures need none"
            )
    dtype = read_json(folder / "config.json").get("dtype")
    if dtype not in _DTYPES:
        raise ReleaseError(
            f"{folder / 'config.json'}: dtype is {short(dtype)}, expected one of "
            f"{', '.join(_DTYPES)}; {_WRITE_AGAIN}"
        )
    return f"{shape.num_layers} layers, {shape.max_positions:,} positions, {dtype}"


def _weights(folder: Path) -> str:
    shape = read_shape(folder, rope_scaling=None)
    described = hf_shapes(shape)
    wanted = _DTYPES.get(str(read_json(folder / "config.json").get("dtype")))
    index = folder / INDEX
    where = find_tensors(folder, shape)  # compares with the architecture: nothing is missing
    held = {f.name: dict(header(f)) for f in sorted(folder.glob("*.safetensors"))}
    named = {tensor: file.name for tensor, file in where.items()}
    for file, tensors in held.items():
        for name, (dtype, _) in tensors.items():
            if named.get(name) != file:
                raise ReleaseError(
                    f"{folder / file} holds {short(name)}, which {index.name} does not name there; "
                    f"{_WRITE_AGAIN}"
                )
            if name not in described:
                raise ReleaseError(
                    f"{folder / file}: tensor {short(name)} is not one of the model that "
                    f"config.json describes; {_WRITE_AGAIN}"
                )
            if dtype != wanted:
                raise ReleaseError(
                    f"{folder / file}: tensor {name} is of type {dtype} and config.json says "
                    f"{wanted}; {_WRITE_AGAIN}"
                )
    if not index.is_file() and list(held) != ["model.safetensors"]:
        raise ReleaseError(
            f"{folder} has {len(held)} files of weights and no {INDEX}; {_WRITE_AGAIN}"
        )
    return f"{len(named)} tensors in {len(held)} file(s), as config.json asks for"


def _tokenizer(folder: Path) -> str:
    check_tokenizer(folder)
    config = folder / "tokenizer_config.json"
    inside = config.is_file() and read_json(config).get("chat_template")
    if not inside and not (folder / "chat_template.jinja").is_file():
        raise ReleaseError(
            f"{folder} has no chat template (chat_template.jinja), with which the model was "
            "trained; copy the base model's"
        )
    return "its files and a chat template are there"


def _card(folder: Path) -> str:
    from huggingface_hub import ModelCard

    file = folder / "README.md"
    try:
        data: Any = ModelCard.load(file).data
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ReleaseError(f"{file} is no model card: {lines[0]}; {_WRITE_AGAIN}") from error
    if not data.to_dict():
        raise ReleaseError(f"{file} has no YAML above its text; {_WRITE_AGAIN}")
    base, licence = data.get("base_model"), data.get("license")
    results = len(data.get("eval_results") or ())
    return (
        f"base model {json.dumps(base) if base else 'not named'}, licence "
        f"{json.dumps(licence) if licence else 'not stated'}, {results} result(s)"
    )
