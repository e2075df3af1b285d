"""Turns questions of official files into rows: what the builders of benchmarks and of training
families share."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_qlrl.data.builders.rows import read_lines, read_list, read_text, write_rows
from megatron_qlrl.data.template import Kind, docqa_message
from megatron_qlrl.errors import DataError


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        source: the row's `data_source`, where the set has several rules.
        extra: fields of `extra_info`, the same for all questions of a set.
        messages: the chat, where the set has one of its own instead of a document.
    """

    question: str
    document: str
    gold: str
    kind: Kind
    source: str = ""
    extra: Mapping[str, str | int] = field(default_factory=dict)
    messages: list[dict[str, str]] | None = None


def write_items(
    name: str,
    items: Iterable[tuple[str, Item]],
    out: Path,
    *,
    data_source: str,
    split: str,
    source: Path,
    check_gold: Callable[[str, str], None],
) -> int:
    """Writes the rows of questions to `out` (parquet) and returns their number.

    Args:
        name: of the set of questions.
        items: (where it stands, question).
        data_source: of the questions that name none.
        source: the file or folder that they come from.

    Raises:
        DataError: a gold cannot be scored, or there are no questions. The message names the place.
        ConfigError: `out` cannot be written, or is one of the inputs.
    """
    rows: list[dict[str, Any]] = []
    for where, item in items:
        own_source = item.source or data_source
        try:
            check_gold(own_source, item.gold)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        rows.append(_row(item, own_source, len(rows), split))
    if not rows:
        raise DataError(f"{source} holds no questions of {name}")
    files = source.rglob("*") if source.is_dir() else [source]
    write_rows(out, rows, inputs=sorted(file for file in files if file.is_file()))
    return len(rows)


def _row(item: Item, data_source: str, index: int, split: str) -> dict[str, Any]:
    document, question = item.document.strip(), item.question.strip()
    message = docqa_message(document=document, question=question, kind=item.kind)
    return {
        "data_source": data_source,
        "prompt": item.messages or [{"role": "user", "content": message}],
        "ability": "docqa",
        "reward_model": {"style": "rule", "ground_truth": item.gold},
        "extra_info": {"split": split, "index": index, **item.extra},
        "document": document,
        "question": question,
    }


def read_records(source: Path, *names: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the records of the first of `names` in a folder, or of `source` if it is a file."""
    path = source
    if source.is_dir():
        present = [source / name for name in names if (source / name).is_file()]
        if not present:
            raise DataError(f"folder {source} has no file {' or '.join(names)}")
        path = present[0]
    is_list = read_text(path, str(path)).lstrip()[:1] == "["
    yield from read_list(path) if is_list else read_lines(path)


def text_of(where: str, record: Any, key: str) -> str:
    """Returns a field that must be a text; as all readers here it raises DataError otherwise."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: `{key}` must be a text that is not empty")
    return value


def texts_of(where: str, record: dict[str, Any], key: str) -> list[str]:
    """Returns a field that must be a list of texts."""
    value = record.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
        raise DataError(f"{where}: `{key}` must be a list of texts that is not empty")
    if not value[0].strip() and key == "answers":
        raise DataError(f"{where}: the first of `{key}` is empty")
    return value


def number_of(where: str, record: dict[str, Any], key: str) -> str:
    """Returns a field that must be a number, as text."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: `{key}` must be a number, found {str(value)[:40]!r}")
    return str(value)
