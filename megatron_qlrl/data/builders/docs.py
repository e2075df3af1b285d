"""Builds a data file in verl's format from your own documents and questions.

Input: a folder of UTF-8 text files, and a JSONL file with one question per line:

    {"document": "report.txt", "question": "What was the revenue?", "answer": "1.5 million",
     "kind": "math"}

`document` may be a list of files, whose texts are joined by an empty line. `kind` is "qa" (the
default), "math" or "choice"; it selects the closing sentence and, through `data_source`, the
reward's rule. A question of kind "choice" holds its options, and its answer is the letter.
`data_source` may be given instead of the kind's own. `response`, on every line or none, makes an
SFT file.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_qlrl.data.builders.rows import read_lines, read_text, write_rows
from megatron_qlrl.data.template import Kind, docqa_message
from megatron_qlrl.errors import DataError

DATA_SOURCE: dict[Kind, str] = {
    "qa": "docs_musique",
    "math": "docs_docmath",
    "choice": "docs_long_toc_choices",
}
"""The default `data_source` of each kind; a part of the name selects the reward's rule."""

_REQUIRED = ("document", "question", "answer")
_KEYS = (*_REQUIRED, "kind", "data_source", "response")


def build_docs(
    *,
    documents_dir: Path,
    questions: Path,
    out: Path,
    split: str,
    check_gold: Callable[[str, str], None],
) -> int:
    """Writes `out` (parquet) and returns its number of rows.

    Args:
        documents_dir: folder of UTF-8 text files.
        questions: JSONL as the module's docstring describes; empty lines are skipped.
        split: written to `extra_info.split`.
        check_gold: raises DataError for a (`data_source`, answer) that no rule can score.

    Raises:
        DataError: a line or a document cannot be used. The message names the file and the line.
        ConfigError: `out` cannot be written, or is one of the inputs.
    """
    if not documents_dir.is_dir():
        raise DataError(f"document folder {documents_dir} does not exist")
    rows: list[dict[str, Any]] = []
    records = [(where, _checked(where, record)) for where, record in read_lines(questions)]
    for where, record in records:
        row = _row(where, record, documents_dir)
        try:
            check_gold(row["data_source"], record["answer"])
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        row["extra_info"] = {"split": split, "index": len(rows)}
        rows.append(row)
        if ("response" in row) != ("response" in rows[0]):
            raise DataError(f"{where}: give `response` on every line (SFT) or on none (RL)")
    if not rows:
        raise DataError(f"{questions} holds no questions")
    documents = {documents_dir / name for _, record in records for name in _names(record)}
    write_rows(out, rows, inputs=[questions, *sorted(documents)])
    return len(rows)


def _checked(where: str, record: dict[str, Any]) -> dict[str, Any]:
    missing = [key for key in _REQUIRED if key not in record]
    unknown = [key for key in record if key not in _KEYS]
    if missing or unknown:
        faults = [f"missing {', '.join(missing)}"] if missing else []
        faults += [f"unknown {', '.join(unknown)}"] if unknown else []
        raise DataError(f"{where}: {'; '.join(faults)}; the keys are {', '.join(_KEYS)}")
    if isinstance(record["answer"], int | float) and not isinstance(record["answer"], bool):
        record["answer"] = str(record["answer"])
    for key in set(record) - {"document"}:
        if not isinstance(record[key], str) or not record[key].strip():
            raise DataError(f"{where}: `{key}` must be a string that is not empty")
    names = _names(record)
    if not isinstance(names, list) or not names or not all(map(_is_name, names)):
        raise DataError(f"{where}: `document` must be a file name or a list of file names")
    if record.get("kind", "qa") not in DATA_SOURCE:
        raise DataError(f"{where}: kind {record['kind']!r} is not one of {', '.join(DATA_SOURCE)}")
    return record


def _row(where: str, record: Mapping[str, Any], documents_dir: Path) -> dict[str, Any]:
    kind: Kind = record.get("kind", "qa")
    document = _document(where, _names(record), documents_dir)
    message = docqa_message(document=document, question=record["question"], kind=kind)
    row = {
        "data_source": record.get("data_source", DATA_SOURCE[kind]),
        "prompt": [{"role": "user", "content": message}],
        "ability": "docqa",
        "reward_model": {"style": "rule", "ground_truth": record["answer"]},
        "document": document,
        "question": record["question"],
    }
    return row | ({"response": record["response"]} if "response" in record else {})


def _names(record: Mapping[str, Any]) -> list[str]:
    names = record["document"]
    return [names] if isinstance(names, str) else names


def _document(where: str, names: list[str], documents_dir: Path) -> str:
    texts = []
    for name in names:
        path = documents_dir / name
        # A question file must not make us read files outside the folder.
        if not path.resolve().is_relative_to(documents_dir.resolve()):
            raise DataError(f"{where}: document {name!r} lies outside {documents_dir}")
        texts.append(read_text(path, where))
        if not texts[-1].strip():
            raise DataError(f"{where}: document {name!r} is empty")
    return "\n\n".join(texts)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and "\0" not in name
