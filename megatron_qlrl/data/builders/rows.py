"""Reads JSON records for the builders, and writes their rows as verl parquet."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_qlrl.data.dataset import verl_schema
from megatron_qlrl.errors import DataError
from megatron_qlrl.platform.files import make_folder, replaced


def read_text(path: Path, where: str) -> str:
    """Returns a file's text.

    Raises:
        DataError: it is no UTF-8 text. The message begins with `where`.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: cannot read {path} as UTF-8 text: {error}") from error


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("<file>, line <number>", object) of a JSONL file; empty lines are skipped.

    Raises:
        DataError: a line is no JSON object.
    """
    for number, line in enumerate(read_text(path, str(path)).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(where, parse_json(where, line, "write one object a line"))


def read_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("<file>, item <number>", object) of a file that holds one JSON list; items count
    from 0.

    Raises:
        DataError: the file holds no list of objects.
    """
    items = parse_json(str(path), read_text(path, str(path)), "the file is one list of objects")
    if not isinstance(items, list):
        raise DataError(f"{path}: expected a list [...], found {type(items).__name__}")
    for number, item in enumerate(items):
        where = f"{path}, item {number}"
        yield where, _object(where, item)


def parse_json(where: str, text: str, expected: str) -> Any:
    """Returns what a JSON text holds.

    Raises:
        DataError: it is no JSON, or a string in it has no UTF-8 form (a lone surrogate).
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); {expected}") from error
    return value


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object {{...}}, found {type(value).__name__}")
    return value


def write_rows(out: Path, rows: Sequence[Mapping[str, Any]], *, inputs: Iterable[Path]) -> None:
    """Writes rows of one kind: the first one's `extra_info` has all fields, texts and integers.

    Raises:
        ConfigError: `out` cannot be written, or is one of the `inputs`.
    """
    types = {str: pa.string(), int: pa.int64()}
    extra = {name: types[type(value)] for name, value in rows[0]["extra_info"].items()}
    schema = verl_schema(extra, has_response="response" in rows[0])
    make_folder(out.parent)
    with replaced(out, inputs=inputs) as fresh:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), fresh)
