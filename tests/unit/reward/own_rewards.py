"""Functions for the tests of `reward.custom`: good, crashing, hanging and lying ones."""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from megatron_qlrl.types import Score

GLOBAL = 3


def share(gold: str, final: str) -> float:
    """The share of the gold's characters that the final text has."""
    return sum(char in final for char in gold) / len(gold)


def everything(
    *, question: str, gold: str, response: str, final: str, extra: Mapping[str, Any]
) -> Score:
    print("printed text must not disturb the replies")
    said = f"{question}|{gold}|{response}|{final}|{extra}"
    return Score(0.25, 0.25, prediction=said)


def any_names(**given: object) -> float:
    return len(given) / 10


def by_order(final: str) -> Any:
    """What a test asks for in the final text."""
    results: dict[str, Any] = {
        "two": 2.0,
        "nan": float("nan"),
        "minus": -1,
        "text": "1.0",
        "true": True,
        "none": None,
        "half": 0.5,
        "score": Score(None, 0.0),
        "lying score": Score(1.5, 0.0),
    }
    if final == "raise":
        raise KeyError("no such thing")
    if final == "loop":
        while True:
            pass
    if final == "sleep":
        time.sleep(600)
    if final == "child":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"], check=True)
    if final == "exit":
        sys.exit(7)
    if final == "abort":
        os.abort()
    if final == "pid":
        return Score(1.0, 1.0, prediction=str(os.getpid()))
    return results[final]


class Judged:
    def __call__(self, final: str) -> float:
        return float("right" in final)


judged = Judged()
wrapped = functools.partial(share, gold="a")


async def later(final: str) -> float:
    return 1.0


def misnamed(final: str, solution_str: str = "") -> float:
    return 1.0


def positional(final: str, /) -> float:
    return 1.0


def lists(*completions: str) -> float:
    return 1.0
