"""Builds the held-out sets of the literature from their official files, in verl's format.

`BENCHMARKS` says for each set how it is read, its data source, licence and download. A question is
asked with the template of training (QwenLong-L1 section 4.1), and the gold is the first answer. All
rows of a set are written, in the order of its files.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_qlrl.data.builders.items import (
    Item,
    number_of,
    read_records,
    text_of,
    texts_of,
    write_items,
)
from megatron_qlrl.data.builders.rows import parse_json
from megatron_qlrl.errors import DataError


@dataclass(frozen=True)
class Benchmark:
    """How a set becomes rows.

    Attributes:
        read: yields (where it stands, question) for the official file, or the folder that holds it.
        data_source: selects the reward's rule.
        size: published number of questions.
    """

    read: Callable[[Path], Iterator[tuple[str, Item]]]
    data_source: str
    size: int
    licence: str
    download: str


def build_benchmark(
    name: str, source: Path, out: Path, *, check_gold: Callable[[str, str], None]
) -> int:
    """Writes the benchmark's rows to `out` (parquet) and returns their number.

    Args:
        name: one of `BENCHMARKS`.
        source: the official file, or the folder that holds the official files.
        check_gold: raises DataError for a (`data_source`, answer) that no rule can score.

    Raises:
        DataError: a file or a row cannot be used. The message names both.
        ConfigError: `out` cannot be written, or is one of the inputs.
    """
    benchmark = BENCHMARKS[name]
    return write_items(
        name,
        benchmark.read(source),
        out,
        data_source=benchmark.data_source,
        split="test",
        source=source,
        check_gold=check_gold,
    )


_DOCMATH_PARTS = ("complong", "compshort", "simplong", "simpshort")
_SELECTION = "docmath_all_test_200.jsonl"


def _docmath_all(source: Path) -> Iterator[tuple[str, Item]]:
    for part in _DOCMATH_PARTS:
        stem = f"{part}_testmini"
        for where, record in read_records(source, f"{stem}.jsonl", f"{stem}.json"):
            item = docmath_item(where, record)
            yield where, replace(item, extra={**item.extra, "part": part})


def docmath_item(where: str, record: dict[str, Any]) -> Item:
    """Returns a question in the schema of DocMath-Eval."""
    return Item(
        question=text_of(where, record, "question"),
        document="\n".join(texts_of(where, record, "paragraphs")),
        gold=number_of(where, record, "ground_truth"),
        kind="math",
        extra={"id": text_of(where, record, "question_id")},
    )


def _docmath(source: Path) -> Iterator[tuple[str, Item]]:
    """The questions of the paper: those that occur with their document in a selected prompt."""
    prompts = []
    for where, record in read_records(source, _SELECTION):
        messages = record.get("prompt")
        first = messages[0] if isinstance(messages, list) and messages else None
        if not isinstance(first, dict):
            raise DataError(f"{where}: `prompt` must be a list of messages")
        prompts.append(text_of(where, first, "content"))
    for where, item in _docmath_all(source):
        question, document = item.question.strip(), item.document.strip()
        if any(question in prompt and document in prompt for prompt in prompts):
            yield where, item


def _frames(source: Path) -> Iterator[tuple[str, Item]]:
    for where, record in read_records(source, "test.jsonl"):
        pages = record.get("wiki_items")
        if not isinstance(pages, list) or not all(isinstance(page, dict) for page in pages):
            raise DataError(f"{where}: `wiki_items` must be a list of {{title, text}}")
        texts = [f"{text_of(where, p, 'title')}\n{text_of(where, p, 'text')}" for p in pages]
        yield (
            where,
            Item(
                question=text_of(where, record, "Prompt"),
                document="\n".join(texts),
                gold=text_of(where, record, "Answer"),
                kind="qa",
            ),
        )


def _longbench(name: str, source: Path) -> Iterator[tuple[str, Item]]:
    for where, record in read_records(source, f"{name}.jsonl"):
        yield (
            where,
            Item(
                question=text_of(where, record, "input"),
                document=text_of(where, record, "context"),
                gold=texts_of(where, record, "answers")[0],
                kind="qa",
                extra={"id": text_of(where, record, "_id")},
            ),
        )


def _longbench_v2(source: Path) -> Iterator[tuple[str, Item]]:
    for where, record in read_records(source, "data.json"):
        options = [f"({x}) {text_of(where, record, f'choice_{x}').strip()}" for x in "ABCD"]
        gold = text_of(where, record, "answer").strip()
        if gold not in tuple("ABCD"):
            raise DataError(f"{where}: `answer` must be A, B, C or D, found {gold[:40]!r}")
        keys = {"id": "_id"} | {key: key for key in ("domain", "difficulty", "length")}
        yield (
            where,
            Item(
                question="\n".join([text_of(where, record, "question").strip(), "", *options]),
                document=text_of(where, record, "context"),
                gold=gold,
                kind="choice",
                extra={name: text_of(where, record, key) for name, key in keys.items()},
            ),
        )


_MRCR_TEXTS = ("prompt", "answer", "random_string_to_prepend")
_MRCR_NUMBERS = ("n_needles", "desired_msg_index", "total_messages", "n_chars")


def _mrcr(source: Path) -> Iterator[tuple[str, Item]]:
    """The gold has two parts, which a line end separates: the prefix that the response must start
    with, and the text that must follow it."""
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    for file in files:
        for number, record in enumerate(_parquet(file, (*_MRCR_TEXTS, *_MRCR_NUMBERS))):
            where = f"{file}, row {number}"
            chat, answer, prefix = (text_of(where, record, key) for key in _MRCR_TEXTS)
            messages = parse_json(where, chat, "`prompt` is a JSON list of messages")
            if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
                raise DataError(f"{where}: `prompt` must be a JSON list of {{role, content}}")
            chat = [{key: text_of(where, m, key) for key in ("role", "content")} for m in messages]
            if not chat or chat[-1]["role"] != "user":
                raise DataError(f"{where}: the last message of `prompt` must be the user's")
            if not answer.startswith(prefix) or "\n" in prefix:
                raise DataError(
                    f"{where}: `answer` must start with `random_string_to_prepend`, one line"
                )
            extra: dict[str, str | int] = {}
            for key in _MRCR_NUMBERS:
                extra[key] = int(number_of(where, record, key))
            yield (
                where,
                Item(
                    question=chat[-1]["content"],
                    document="",
                    gold=f"{prefix}\n{answer.removeprefix(prefix)}",
                    kind="qa",
                    extra=extra,
                    messages=chat,
                ),
            )


_SCALES = ("thousand", "million", "billion", "percent", "")
_TATQA_TYPES = ("span", "multi-span", "arithmetic", "count")
_TATQA_HINT = "Give the number with its scale (thousand, million, billion or percent), if any."
# A number as reports write it; in brackets it is negative. A bare year is no quantity.
_FIGURE = re.compile(
    r"(?!(?:19|20)\d\d$)[-−]?[$£€¥]?\s*(\()?\s*[$£€¥]?\s*(-?[\d,]*\.?\d+)\s*\)?"
    r"\s*(%|thousand|million|billion)?"
)


def _tatqa(source: Path) -> Iterator[tuple[str, Item]]:
    names = [f"tatqa_dataset_{split}.json" for split in ("dev", "test_gold", "train")]
    for where, record in read_records(source, *names):
        table = record.get("table")
        rows = table.get("table") if isinstance(table, dict) else None
        paragraphs, questions = record.get("paragraphs"), record.get("questions")
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise DataError(f"{where}: `table.table` must be a list of rows")
        if not isinstance(paragraphs, list) or not isinstance(questions, list):
            raise DataError(f"{where}: `paragraphs` and `questions` must be lists")
        try:
            ordered = sorted(paragraphs, key=lambda paragraph: paragraph["order"])
        except (TypeError, KeyError) as error:
            raise DataError(f"{where}: every paragraph needs `order`, a number") from error
        texts = [text_of(where, paragraph, "text") for paragraph in ordered]
        texts += [" | ".join(map(str, row)) for row in rows]
        for number, question in enumerate(questions):
            at = f"{where}, question {number}"
            if not isinstance(question, dict):
                raise DataError(f"{at}: expected an object {{...}}")
            yield at, _tatqa_item(at, question, "\n".join(texts))


def _tatqa_item(where: str, record: dict[str, Any], document: str) -> Item:
    answer, scale, form = (record.get(key) for key in ("answer", "scale", "answer_type"))
    if scale not in _SCALES or form not in _TATQA_TYPES:
        raise DataError(
            f"{where}: scale {scale!r} and answer_type {form!r} must be among {_SCALES} and "
            f"{_TATQA_TYPES}"
        )
    spans = [text for part in (answer if isinstance(answer, list) else [answer])
             if (text := "" if part is None else str(part).strip())]  # fmt: skip
    if not spans:
        raise DataError(f"{where}: `answer` is empty")
    figures = [_figure(text, scale) for text in spans]
    is_number = form in ("arithmetic", "count") or (
        form == "span" and _FIGURE.fullmatch(spans[0]) is not None
    )
    question = text_of(where, record, "question").strip()
    return Item(
        question=f"{question} {_TATQA_HINT}" if is_number else question,
        document=document,
        gold="; ".join(figures),
        kind="math" if is_number else "qa",
        source="tatqa_docmath" if is_number else "tatqa_musique",
        extra={"id": text_of(where, record, "uid"), "answer_type": form, "scale": scale},
    )


def _figure(text: str, scale: str) -> str:
    """Returns "-114 million" for "(114)" and the scale million. Other texts stay as they are."""
    match = _FIGURE.fullmatch(text)
    if match is None:
        return text
    bracket, digits, unit = match.groups()
    sign = "-" if (bracket or text[0] in "-−") and digits[0] != "-" else ""
    unit = unit or scale.replace("percent", "%")
    return f"{sign}{digits}{unit if unit == '%' else f' {unit}'}".rstrip()


def _parquet(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise DataError(f"{path} has no column {', '.join(missing)}")
            for batch in file.iter_batches(16, columns=list(columns)):
                batch.validate(full=True)
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} cannot be read as a parquet file: {error}") from error


def _hf(repository: str) -> str:
    return f"hf download --repo-type dataset {repository} --local-dir SOURCE"


_LONGBENCH_LICENCE = "that of the original set; LongBench's own part is MIT"
BENCHMARKS: dict[str, Benchmark] = {
    "docmath": Benchmark(_docmath, "docmath", 200, "MIT", _hf("Tongyi-Zhiwen/docmath")),
    "docmath_all": Benchmark(_docmath_all, "docmath", 800, "MIT", _hf("Tongyi-Zhiwen/docmath")),
    "frames": Benchmark(
        _frames,
        "frames",
        824,
        "Apache 2.0; the articles are Wikipedia's, CC BY-SA",
        _hf("Tongyi-Zhiwen/frames"),
    ),
    **{
        name: Benchmark(
            partial(_longbench, name),
            f"longbench_{source}",
            200,
            _LONGBENCH_LICENCE,
            _hf("Tongyi-Zhiwen/longbench"),
        )
        for name, source in {
            "2wikimqa": "2wikimultihopqa",
            "hotpotqa": "hotpotqa",
            "musique": "musique",
            "narrativeqa": "narrativeqa",
            "qasper": "qasper",
        }.items()
    },
    "longbench_v2": Benchmark(
        _longbench_v2,
        "longbench_v2_long_toc_choices",
        503,
        "Apache 2.0",
        _hf("THUDM/LongBench-v2"),
    ),
    "mrcr": Benchmark(_mrcr, "mrcr", 2400, "MIT", _hf("openai/mrcr")),
    "tatqa": Benchmark(
        _tatqa,
        "tatqa_docmath",
        1668,
        "CC BY 4.0",
        "git clone https://github.com/NExTplusplus/TAT-QA SOURCE  # files in dataset_raw/",
    ),
}
"""Every benchmark by name; no other is known."""
