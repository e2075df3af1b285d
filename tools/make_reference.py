"""Writes docs/config.md, the reference of every setting, from `megatron_qlrl/config/schema.py`.

    python tools/make_reference.py            writes the file
    python tools/make_reference.py --check    exit code 1 when the file is stale

Types, limits and defaults come from the fields, the meanings from the docstrings below them.
docs/metrics.md is written by hand; `undocumented` finds the metrics that it lacks.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_qlrl.config.schema import Config, Section

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "config.md"
GLOSSARY = DOCS / "metrics.md"
INTRODUCTION = """\
# Configuration

<!-- Written by tools/make_reference.py from megatron_qlrl/config/schema.py; do not edit. -->

A config is a YAML file with only what differs from the defaults below. Only `model.path` has no
default. [examples/quickstart/config.yaml](../examples/quickstart/config.yaml) is a whole config.

- Any setting can be given on the command line, where it wins over the file:
  `qlrl rl config.yaml policy.tp=2 "data.train_files=[a.parquet,b.parquet]" phases.1.steps=40`.
- `${run.dir}` refers to another setting. Nothing is taken from the environment.
- Unknown names and values out of range are errors, which name the setting and what it takes.
- A phase may have settings of its own: [phases](#phases), `overrides`.
- `qlrl check config.yaml` checks a config against the machine, the files and the model. A run
  writes its resolved config to `<run.dir>/config.yaml`.

"""


def page() -> str:
    """The whole page."""
    sections = list(_sections("", Config))
    index = " · ".join(f"[{name}](#{_anchor(name)})" for name, _ in sections)
    return INTRODUCTION + index + "\n" + "".join(_section(name, kind) for name, kind in sections)


def _sections(prefix: str, section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """Dotted names and classes of the sections below `section`, in the order of the schema."""
    for name, field in section.model_fields.items():
        if kind := _subsection(field.annotation):
            yield prefix + name, kind
            yield from _sections(f"{prefix}{name}.", kind)


def _section(name: str, kind: type[Section]) -> str:
    rows = [_row(name, key, field) for key, field in kind.model_fields.items()]
    head = "| setting | type | default | meaning |\n|---|---|---|---|\n"
    return f"\n## {name}\n\n{_prose(inspect.getdoc(kind))}\n\n{head}{''.join(rows)}"


def _row(section: str, key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else _code(_yaml(field.default))
    meaning = _prose(field.description)
    if _subsection(field.annotation):
        meaning += f" Section [{section}.{key}](#{_anchor(f'{section}.{key}')})."
    return f"| `{key}` | {_type(field)} | {default} | {meaning} |\n"


def _type(field: FieldInfo) -> str:
    """The type with its limits, in words and code that a Markdown table takes."""
    limits = " and ".join(
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in (("gt", "&gt;"), ("ge", "≥"), ("lt", "&lt;"), ("le", "≤"))
        if hasattr(limit, name)
    )
    name, null, _ = _type_name(field.annotation).partition(" or null")
    return " ".join(filter(None, (name, limits))) + null


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return ", ".join(_code(value) for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join("null" if a is type(None) else _type_name(a) for a in arguments)
    if origin is tuple:
        number = "list of" if arguments[-1] is Ellipsis else str(len(arguments))
        return f"{number} {_type_name(arguments[0])}s"
    if origin is dict:
        return "mapping"
    if _subsection(annotation):
        return "section"
    return {str: "text", bool: "true or false", float: "number", int: "integer"}[annotation]


def _subsection(annotation: Any) -> type[Section] | None:
    """The section that the annotation has anywhere: itself, in a union, or in a tuple."""
    if inspect.isclass(annotation):
        return annotation if issubclass(annotation, Section) else None
    return next(filter(None, map(_subsection, get_args(annotation))), None)


def _yaml(value: Any) -> str:
    """A default as YAML has it in one line."""
    return value if isinstance(value, str) else json.dumps(value)


def _prose(text: str | None) -> str:
    """A docstring in one line that a Markdown table takes; it names values as YAML does."""
    line = " ".join((text or "").split()).replace("<", "&lt;").replace("|", "\\|")
    line = re.sub(r"\bNone\b", "`null`", line)
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", line)


def _code(text: str) -> str:
    return f"`{text}`"


def _anchor(name: str) -> str:
    return name.replace(".", "")


def documented_metrics() -> list[str]:
    """The names in the first columns of the glossary's tables; <...> stands for anything."""
    cells = re.findall(r"^\| (`[^|]*`) \|", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def undocumented(names: Iterable[str]) -> list[str]:
    """Those of the metrics that the glossary does not explain."""
    patterns = [re.sub(r"<[^>]*>", ".+", re.escape(name)) for name in documented_metrics()]
    known = re.compile("|".join(patterns))
    return sorted(name for name in names if not known.fullmatch(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    fresh = page()
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == fresh:
        return 0
    if arguments.check:
        print(f"{PAGE} is stale: run python tools/make_reference.py", file=sys.stderr)
        return 1
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
