"""YAML file + dotted overrides -> `Config`; every mistake becomes one `ConfigError`."""

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import ConfigError

# pydantic speaks of Python's types, the user writes YAML.
_EXPECTED = {
    "tuple_type": "a list, as in [a, b]",
    "model_type": "a section, `key: value` lines",
    "dict_type": "a section, `key: value` lines",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `path` and applies overrides such as `policy.tp=2` (values are YAML).

    Raises:
        ConfigError: the file, a key or a value is wrong; all problems in one message.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; pass the path of a YAML file")
    try:
        tree = OmegaConf.load(path)
        if not isinstance(tree, DictConfig):
            raise ConfigError(f"{path}: expected sections such as `model:`, found a list")
        for override in overrides:
            _apply(tree, override)
        raw = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as a config: {error}") from error
    config = _checked(f"{path}: ", lambda: Config.model_validate(raw))
    for index in range(len(config.phases)):
        where = f"{path}: phases.{index}.overrides: "
        _checked(where, partial(config.for_phase, index))
    return config


def _checked(where: str, make: Callable[[], Config]) -> Config:
    try:
        return make()
    except ValidationError as error:
        lines = [f"{where}{len(error.errors())} problem(s) in the configuration"]
        lines += [f"  {_explain(item)}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def _apply(tree: DictConfig, override: str) -> None:
    """Sets one `section.key=value`; list elements are reached by number (phases.0.steps=3)."""
    key, equals, value = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError(
            f"override '{override}' is not of the form section.key=value (example: policy.tp=2)"
        )
    try:
        parsed = OmegaConf.from_dotlist([f"value={value}"])["value"]
        OmegaConf.update(tree, key, parsed, merge=True)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, IndexError) as error:
        # omegaconf lets Python's own errors through where a list meets a name or a number.
        problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"override '{override}' cannot be applied: {problem}") from error


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved config as YAML that `load_config` reads back to an equal value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        names = _valid_names(item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(names)}"
        return f"unknown key '{where}'; {hint}"
    if item["type"] == "missing":
        return f"'{where}' is required; set it in the file or on the command line ({where}=...)"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] in _EXPECTED:
        return f"{where}: expected {_EXPECTED[item['type']]} (got {item['input']!r})"
    return f"{where}: {item['msg']} (got {item['input']!r})"


def _valid_names(loc: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in loc:
        if isinstance(part, int):
            continue
        annotation: Any = model.model_fields[part].annotation
        args = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)]
        model = annotation if isinstance(annotation, type) and not args else args[0]
    return list(model.model_fields)
