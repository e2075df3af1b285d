"""Finds the shape of a model that need not be here: a plan reads no weights.

`shapes.json` holds what `read_shape` reads of `config.json`, for the models of the recipes and
others of their kind. Its source is the file at https://huggingface.co/<name>/blob/main/config.json.
"""

import re
from pathlib import Path

from megatron_qlrl.config.schema import MODEL_NAME, ModelConfig
from megatron_qlrl.config.shape import ModelShape, read_json, read_shape
from megatron_qlrl.errors import ConfigError

SHIPPED = Path(__file__).parent / "shapes.json"


def find_shape(model: ModelConfig) -> tuple[ModelShape, str]:
    """Returns the shape of `model.path`, and where it was read. The path wins if there is anything
    at it, then a config.json in huggingface_hub's cache, then a shipped shape. Nothing is
    downloaded.

    Raises:
        ConfigError: none of the three applies, or as `ModelShape.from_hf`.
    """
    from huggingface_hub import try_to_load_from_cache

    path, scaling = Path(model.path), model.rope_scaling
    if path.is_dir():
        return read_shape(path, rope_scaling=scaling), str(path / "config.json")
    if path.is_file():
        return ModelShape.from_hf(read_json(path), scaling, where=str(path)), str(path)
    names = [model.path, model.name or ""]
    for name in names:
        # The answer is a path, or says that the file is not in the cache.
        cached = re.fullmatch(MODEL_NAME, name) and try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            hf = read_json(Path(cached))
            return ModelShape.from_hf(hf, scaling, where=cached), cached
    shipped = read_json(SHIPPED)
    for name in names:
        for full, hf in shipped.items():
            if Path(full).name == Path(name).name:
                where = f"shipped for {full}"
                return ModelShape.from_hf(hf, scaling, where=f"the shape {where}"), where
    raise ConfigError(
        f"model folder {path} does not exist, and no shape of that name is known. `qlrl plan` "
        "needs one of three: model.path is a folder with a config.json, or that file; or it is a "
        "name on the Hugging Face hub whose config.json is in the cache (hf download NAME "
        f"config.json); or it ends in one of {', '.join(Path(full).name for full in shipped)}"
    )
