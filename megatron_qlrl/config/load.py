"""Makes a `Config` of a YAML file and overrides; all mistakes become one `ConfigError`."""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import ConfigError

_NO_REFERENCE = re.compile(r"\$\{[^{}]*(?::|\$\{)")  # a resolver, or one reference in another

MAX_DEPTH, MAX_VALUES = 20, 100_000

# omegaconf raises Python's own errors if a list is used where a name or number belongs.
_UNREADABLE = (
    OmegaConfBaseException, yaml.YAMLError, AssertionError, IndexError, OSError, TypeError,
    ValueError,
)  # fmt: skip

# pydantic speaks of Python's types, the user writes YAML.
_EXPECTED = {
    "tuple_type": "a list, as in [a, b]",
    "model_type": "a section, `key: value` lines",
    "dict_type": "a section, `key: value` lines",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `path`, a file or a folder with a config.yaml, and applies overrides such as
    `policy.tp=2` (values are YAML).

    Raises:
        ConfigError: the file, a key or a value is wrong; all problems in one message.
    """
    path = Path(path)
    if path.is_dir():
        path /= "config.yaml"
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; pass the path of a YAML file")
    try:
        _check_size(path.read_text(encoding="utf-8"), str(path))
        tree = OmegaConf.load(path)
        if not isinstance(tree, DictConfig):
            raise ConfigError(f"{path}: expected sections such as `model:`, found a list")
        for override in overrides:
            _apply(tree, override)
        _check_references(OmegaConf.to_container(tree, resolve=False))
        raw = OmegaConf.to_container(tree, resolve=True)
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read as a config: it is nested too deeply") from None
    except _UNREADABLE as error:
        raise ConfigError(f"{path}: cannot be read as a config: {_said(error)}") from error
    config = _checked(f"{path}: ", lambda: Config.model_validate(raw))
    for index in range(len(config.phases)):
        where = f"{path}: phases.{index}.overrides: "
        _checked(where, partial(config.for_phase, index))
    return config


def _check_size(text: str, where: str) -> None:
    """Refuses YAML before it is built: libyaml crashes on deep nesting, and a few references to
    references (&a, *a) can stand for billions of values.

    Raises:
        ConfigError: more than `MAX_DEPTH` levels or `MAX_VALUES` values.
        yaml.YAMLError: this is no YAML.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    sizes: dict[str | None, int] = {}  # values below an anchor
    open_nodes: list[tuple[str | None, int]] = []
    count = 0
    for event in cast("Iterator[Any]", yaml.parse(text, Loader=loader)):  # pyright: ignore
        if isinstance(event, yaml.NodeEvent):
            count += sizes.get(event.anchor, 0) if isinstance(event, yaml.AliasEvent) else 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes[anchor] = count - before + 1
        if len(open_nodes) > MAX_DEPTH or count > MAX_VALUES:
            raise ConfigError(
                f"{where}: cannot be read as a config: it is nested more than {MAX_DEPTH} levels "
                f"deep or has more than {MAX_VALUES} values"
            )


def _checked(where: str, make: Callable[[], Config]) -> Config:
    try:
        return make()
    except ValidationError as error:
        lines = [f"{where}{len(error.errors())} problem(s) in the configuration"]
        lines += [f"  {_explain(item)}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def _check_references(value: Any, where: str = "") -> None:
    """Refuses every ${...} of omegaconf except a plain reference to another setting: a value from
    the environment would be written into every saved config.yaml and sent to wandb.

    Raises:
        ConfigError: there is one; the message names the setting.
    """
    if isinstance(value, dict):
        for key, inner in cast("dict[Any, Any]", value).items():
            _check_references(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(cast("list[Any]", value)):
            _check_references(inner, f"{where}.{index}")
    elif isinstance(value, str) and _NO_REFERENCE.search(value):
        raise ConfigError(
            f"{where}: '{value}' is no plain reference to a setting, such as ${{run.dir}}, and is "
            "not filled in: configs are saved beside results. A path from the environment goes on "
            'the command line ("run.dir=$SCRATCH/run"); a key stays in its variable, whose NAME '
            "the setting api_key_env takes"
        )


def _apply(tree: DictConfig, override: str) -> None:
    """Sets one `section.key=value`; list elements are reached by number (phases.0.steps=3)."""
    key, equals, value = override.partition("=")
    if not equals or not key or key.startswith("-") or len(re.findall(r"[.\[]", key)) > MAX_DEPTH:
        raise ConfigError(
            f"override '{override[:80]}' is not of the form section.key=value (example: "
            "policy.tp=2)"
        )
    try:
        _check_size(value, f"override '{override[:80]}'")
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
        OmegaConf.update(tree, key, cast("dict[str, Any]", parsed)["value"], merge=True)
    except _UNREADABLE as error:
        raise ConfigError(
            f"override '{override}' cannot be applied: {_said(error).splitlines()[0]}"
        ) from error


def _said(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


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
