"""A file of lines that survive a crash: each is on disk before the next one is begun."""

import os
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from megatron_qlrl.errors import DataError

T = TypeVar("T")


class JournalFile:
    """A text file that grows by whole lines. A last line that a crash cut off is taken away."""

    def __init__(self, path: Path) -> None:
        """Keeps the lines that are there in `lines`.

        Raises:
            OSError, ValueError: the file cannot be read or written.
        """
        self.lines = _whole_lines(path) if path.exists() else []
        self._file = path.open("a", encoding="utf-8")

    def add(self, line: str) -> None:
        """Appends a line; it survives whatever comes next.

        Raises:
            DataError: it cannot be written.
        """
        try:
            self._file.write(line + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"journal {self._file.name} cannot be written: {error}") from error

    def close(self) -> None:
        self._file.close()


def open_journal(path: Path, adapter: TypeAdapter[T]) -> tuple[JournalFile, list[T]]:
    """Returns the journal at `path`, which is made if it is not there, and the records of its
    lines.

    Raises:
        DataError: the file cannot be read or written, or a line is no record.
    """
    try:
        file = JournalFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"journal {path} cannot be used: {error}") from error
    lines = enumerate(file.lines, 1)
    return file, [parse_line(adapter, line, f"journal {path}, line {n}") for n, line in lines]


def parse_line(adapter: TypeAdapter[T], line: str, where: str) -> T:
    """Returns the record of a line.

    Raises:
        DataError: the line is none; the message says what is wrong with it.
    """
    try:
        return adapter.validate_json(line, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "line"
        raise DataError(
            f"{where} cannot be used: {field}: {problem['msg']}; take the line out and start again"
        ) from None


def _whole_lines(path: Path) -> list[str]:
    """Returns the lines of the file; a last one without its line end is cut off the file."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.decode("utf-8").split("\n")[:-1]
