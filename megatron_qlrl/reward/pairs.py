"""Reads the labelled pairs of answers on which judges are measured.

Every line of labelled_pairs.jsonl is a question, its gold answer, another answer, and whether a
careful reader calls the two equivalent under the rules of the judge's prompt.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

Label = Literal["equivalent", "different"]

_FILE = Path(__file__).with_name("labelled_pairs.jsonl")


@dataclass(frozen=True)
class Pair:
    """One line; `reason` says why the label holds."""

    category: str
    question: str
    gold: str
    answer: str
    label: Label
    reason: str


@cache
def read_pairs() -> tuple[Pair, ...]:
    """Returns the pairs in the order of the file."""
    adapter = TypeAdapter(Pair)
    lines = _FILE.read_text(encoding="utf-8").split("\n")[:-1]
    return tuple(adapter.validate_json(line) for line in lines)


@cache
def pairs_digest() -> str:
    """Returns what stands for this version of the set in certificates."""
    return hashlib.sha256(_FILE.read_bytes()).hexdigest()
