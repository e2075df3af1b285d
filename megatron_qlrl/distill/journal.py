"""What the teacher has answered so far, on disk as it comes."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_qlrl.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One answer of the teacher. `finished`: ended by itself."""

    uid: str
    sample: int
    response: str
    finished: bool


_SAMPLE = TypeAdapter(Sample)


class Journal:
    """What the teacher has answered so far: JSONL, one line a sample, synced as it comes.

    The first line holds the settings; a line that a crash cut off is taken away.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """
        Raises:
            DataError: the journal belongs to other settings, or cannot be read or written.
        """
        self.samples: dict[tuple[str, int], Sample] = {}
        head = json.dumps({"settings": settings}, sort_keys=True)
        try:
            text = path.read_bytes() if path.exists() else b""
            first = text.partition(b"\n")[0].decode("utf-8")
            # Until here nothing is changed: the file may be no journal at all.
            if first != head and not head.startswith(text.decode("utf-8")):
                raise DataError(
                    f"{path} was begun with other settings ({first[:300]}); use the same, name "
                    "another OUT, or remove it to start again"
                )
            lines = _whole_lines(path) if text else []
            for number, line in enumerate(lines[1:], 2):
                sample = _sample(line, f"journal {path}, line {number}")
                self.samples[sample.uid, sample.sample] = sample
            self._file = path.open("a", encoding="utf-8")
            if not lines:
                self._write(head)
        except (OSError, ValueError) as error:
            raise DataError(f"journal {path} cannot be used: {error}") from error

    def add(self, sample: Sample) -> None:
        """Records a sample; it survives whatever comes next."""
        key = (sample.uid, sample.sample)
        assert key not in self.samples, key
        self._write(json.dumps(asdict(sample)))
        self.samples[key] = sample

    def close(self) -> None:
        self._file.close()

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _whole_lines(path: Path) -> list[str]:
    """The lines of the file; a last one without its line end is cut off the file."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.decode("utf-8").split("\n")[:-1]


def _sample(line: str, where: str) -> Sample:
    try:
        return _SAMPLE.validate_json(line, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "line"
        raise DataError(
            f"{where} cannot be used: {field}: {problem['msg']}; take the line out and start again"
        ) from None
