"""What the teacher has answered so far, on disk as it comes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megatron_qlrl.errors import DataError
from megatron_qlrl.platform.journal import JournalFile, parse_line


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
                    f"{path} was begun with other settings ({first[:300]}); use the same, "
                    "write to another place, or remove it to start again"
                )
            self._file = JournalFile(path)
            for number, line in enumerate(self._file.lines[1:], 2):
                sample = parse_line(_SAMPLE, line, f"journal {path}, line {number}")
                self.samples[sample.uid, sample.sample] = sample
            if not self._file.lines:
                self._file.add(head)
        except (OSError, ValueError) as error:
            raise DataError(f"journal {path} cannot be used: {error}") from error

    def add(self, sample: Sample) -> None:
        """Records a sample; it survives whatever comes next."""
        key = (sample.uid, sample.sample)
        assert key not in self.samples, key
        self._file.add(json.dumps(asdict(sample)))
        self.samples[key] = sample

    def close(self) -> None:
        self._file.close()
