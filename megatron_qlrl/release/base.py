"""What a model folder says of the model in it: its name and its licence."""

import re
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import metadata_load

from megatron_qlrl.config.schema import MODEL_NAME

TAG = "megatron_qlrl"
"""Stands among the tags on the card of every release of this package."""
UNNAMED = "not named (set model.name)"
_LICENCE = {
    "license": r"[a-z0-9][a-z0-9.+-]{0,63}",
    "license_name": r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}",
    "license_link": r"LICENSE(\.[a-z]+)?|https://[\w.-]+/[\w./%+-]{1,300}",
}
"""Fields of a card on the licence, and what they may say: they are copied to other cards."""


def is_release(folder: Path) -> bool:
    """Returns whether this package wrote the model folder's card."""
    tags = _metadata(folder).get("tags")
    return isinstance(tags, list) and TAG in tags


def base_name(folder: Path) -> str:
    """Returns the name of the model in `folder`, never a path. A release of this package has its
    base's name, a folder of Hugging Face's cache its repository's, any other folder its own. Every
    release's folder is called "hf", so "hf" is not a name."""
    base = _metadata(folder).get("base_model")
    if is_release(folder) and isinstance(base, str) and re.fullmatch(MODEL_NAME, base):
        return base
    places = [part for part in folder.absolute().parts if part.startswith("models--")]
    name = "/".join(places[-1].split("--")[1:]) if places else folder.absolute().name
    return name if re.fullmatch(MODEL_NAME, name) and name != "hf" else UNNAMED


def licence(folder: Path) -> dict[str, str]:
    """Returns the fields about the licence on the card of the model in `folder`; {} if it names
    none."""
    metadata = _metadata(folder)
    fields = {
        key: value
        for key, pattern in _LICENCE.items()
        if isinstance(value := metadata.get(key), str) and re.fullmatch(pattern, value)
    }
    return fields if "license" in fields else {}


def _metadata(folder: Path) -> dict[str, Any]:
    """Returns what stands above the text of the folder's card; {} without one that can be read."""
    try:
        return cast("dict[str, Any]", metadata_load(folder / "README.md") or {})
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
