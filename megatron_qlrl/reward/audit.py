"""Scores files of responses offline, one row {data_source, question, ground_truth, response} at a
time.

rows (streamed) -> the scorer of training -> rows with their score, in order -> counts by source
"""

# pyarrow has no types.
# pyright: basic

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from megatron_qlrl.errors import ConfigError, DataError
from megatron_qlrl.reward.extract import final_text
from megatron_qlrl.reward.score import Scorer
from megatron_qlrl.types import Score

FIELDS = ("data_source", "question", "ground_truth", "response")
REASONING = "reasoning"
"""Optional field: "required" if the prompt had opened `<think>`, else "optional"."""
_BATCH_ROWS = 1024
_MAX_WAITING = 4096
"""The largest number of rows in memory at one time."""

Row = dict[str, Any]


@dataclass
class Tally:
    """Counts of one data source. The judge is asked only about responses that the rule gave 0."""

    rows: int = 0
    rule: int = 0
    asked: int = 0
    judge: int = 0
    masked: int = 0
    score: float = 0.0

    def add(self, score: Score) -> None:
        self.rows += 1
        self.rule += score.rule > 0
        self.asked += score.judge is not None or score.value is None
        self.judge += score.judge == 1
        self.masked += score.value is None
        self.score += score.value or 0.0


@dataclass
class Audit:
    """The result of an audit; `bad` holds one line for each row that could not be scored."""

    sources: dict[str, Tally] = field(default_factory=dict[str, Tally])
    bad: list[str] = field(default_factory=list[str])

    def table(self) -> str:
        """Returns a table of the counts by source and in total. `rule` and `judge` count the
        answers that each accepted; `both` is the mean of max(rule, judge) over the rows with a
        verdict."""
        total = Tally(
            **{
                f.name: sum(getattr(t, f.name) for t in self.sources.values())
                for f in fields(Tally)
            }
        )
        lines = [
            f"{'source':<28}{'rows':>8}{'rule':>8}{'asked':>8}{'judge':>8}{'masked':>8}{'both':>8}"
        ]
        for name, t in [*sorted(self.sources.items()), ("all", total)]:
            judged = t.rows - t.masked
            both = f"{t.score / judged:.1%}" if judged else "-"
            lines.append(
                f"{name[:27]:<28}{t.rows:>8}{t.rule:>8}{t.asked:>8}{t.judge:>8}{t.masked:>8}{both:>8}"
            )
        return "\n".join(lines)


def audit(
    file: Path, scorer: Scorer, write: Callable[[Row], None], *, reasoning_open: bool | None
) -> Audit:
    """Scores every row that can be read. `write` gets them in order, with `rule`, `judge`, `score`,
    `matched` and `masked` added.

    Args:
        reasoning_open: whether the prompts of rows without the field `reasoning` had opened
            `<think>`; None if that is not known.

    Raises:
        DataError: the file is neither JSONL nor parquet, cannot be opened, or holds no row that
            can be scored.
        ConfigError: a row's score depends on `reasoning_open`, which is None.
    """
    result = Audit()
    waiting: deque[tuple[Row, Future[Score]]] = deque()

    def finish() -> None:
        row, future = waiting.popleft()
        score = future.result()
        result.sources.setdefault(row["data_source"], Tally()).add(score)
        write(
            row
            | {"rule": score.rule, "judge": score.judge, "score": score.value}
            | {"matched": score.matched, "masked": score.value is None}
        )

    for where, read in _rows(file):
        try:
            row = read()
            texts = {name: _text(row, name) for name in FIELDS}
            opened = _reasoning_open(row, default=reasoning_open)
        except DataError as error:
            result.bad.append(f"{where}: {error}")
            continue
        if opened is None:
            raise ConfigError(
                f"{where}: the response has no reasoning tags, and nothing says whether its prompt "
                "had opened <think>. Pass --model with the folder of the model that wrote it, or "
                "--reasoning optional (instruct models: the whole response counts) or --reasoning "
                "required (it scores 0), or give the rows the field `reasoning`"
            )
        try:
            extra = row.get("extra_info")
            future = scorer.submit(
                **texts, reasoning_open=opened, extra=extra if isinstance(extra, dict) else None
            )
        except DataError as error:
            result.bad.append(f"{where}: {error}")
            continue
        waiting.append((row, future))
        if len(waiting) >= _MAX_WAITING:
            finish()
    while waiting:
        finish()
    if not result.sources:
        raise DataError("\n  ".join([f"{file} holds no row that can be scored", *result.bad[:5]]))
    return result


def _reasoning_open(row: Row, *, default: bool | None) -> bool | None:
    """Returns what the row says, or else the default. A response with tags of its own scores the
    same either way, so an unknown default is then False."""
    said = row.get(REASONING)
    if said is None:
        tagged = final_text(row["response"], reasoning_open=False) != row["response"]
        return False if tagged and default is None else default
    if said not in ("required", "optional"):
        raise DataError(f"field '{REASONING}' is {said!r}, expected 'required' or 'optional'")
    return said == "required"


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        kind = "is missing" if name not in row else f"is a {type(value).__name__}, expected text"
        raise DataError(f"field '{name}' {kind}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"field '{name}' is no Unicode text: {error}") from None
    return value


def _rows(file: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yields each row's place in the file, and a function that returns the row or raises
    DataError."""
    readers = {".parquet": _parquet_rows, ".jsonl": _json_rows}
    if not file.is_file():
        raise DataError(f"{file} does not exist")
    if file.suffix not in readers:
        raise DataError(f"{file}: expected a .jsonl or .parquet file")
    try:
        yield from readers[file.suffix](file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


def _json_rows(file: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file}:{number}", lambda line=line: _json_row(line)


def _json_row(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not readable as JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"a {type(row).__name__}, expected a JSON object")
    return cast("Row", row)


def _parquet_rows(file: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        reader = pq.ParquetFile(file)
        columns = [n for n in (*FIELDS, REASONING) if n in reader.schema_arrow.names]
        number = 0
        for batch in reader.iter_batches(_BATCH_ROWS, columns=columns):
            batch.validate(full=True)  # a text that is no UTF-8 is refused here
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:{number}", lambda row=row: row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable parquet file: {error}") from error
