"""Seeded damage for the readers of files from outside, and the one rule for what a reader may do
with it: give a result, or end in one error whose message is meant for the user.

A case is made from its seed alone: `check_case(..., seed=123)` repeats the one that failed. The
number of cases is the fixture `fuzz_cases` (`pytest --fuzz-cases 100000` for a long run).
"""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from megatron_qlrl.errors import QlrlError

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 10**25, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "0", "32", "null", "\0", "\ud800", "../x", "a" * 3000, [], [[]], [None], {},
    {"": None}, {"a": {"b": []}},
)  # fmt: skip
"""Values of every type of JSON at the edges of what readers expect."""

NESTED = 100_000
"""So deep json's own reader gives up with a RecursionError."""


def mutate(value: Any, rng: Random) -> Any:
    """A copy of a JSON-like value, changed in one place: a value replaced, removed, doubled, moved
    to another name, or wrapped into a list or a dict."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return rng.choice(ODD)
    parent, key = rng.choice(places)
    how = rng.randrange(7)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif how == 1:
        parent[rng.choice(("", "x", f"{key}s", key.upper()))] = parent.pop(key)
    elif how == 2:
        parent[key] = rng.choice(([parent[key]], {"x": parent[key]}, str(parent[key])))
    elif how == 3:
        other, name = rng.choice(places)
        parent[key] = copy.deepcopy(other[name])
    else:
        parent[key] = copy.deepcopy(rng.choice(ODD))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (list or dict, index or name) inside."""
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield value, key
            yield from _places(value[key])


def mutate_bytes(raw: bytes, rng: Random) -> bytes:
    """Bytes with a few of them changed, removed, repeated or put in."""
    at = rng.randrange(len(raw) + 1)
    end = min(len(raw), at + rng.randrange(1, 40))
    how = rng.randrange(6)
    if how == 0:
        return raw[:at]
    if how == 1:
        return raw[:at] + raw[end:]
    if how == 2:
        return raw[:end] + raw[at:]
    if how == 3:
        return raw[:at] + rng.randbytes(end - at) + raw[end:]
    if how == 4:
        more = rng.choice((b"\xff", b"\0", b"\xef\xbb\xbf", b"\n", b'"', b"}"))
        return raw[:at] + more + raw[at:]
    return raw[:at] + bytes(b ^ (1 << rng.randrange(8)) for b in raw[at:end]) + raw[end:]


def mutate_json(raw: bytes, rng: Random) -> bytes:
    """A JSON document changed in one to three places, now and then as bytes or nested deeply."""
    how = rng.random()
    if how < 0.1:
        return mutate_bytes(raw, rng)
    value = json.loads(raw)
    for _ in range(rng.randint(1, 3)):
        value = mutate(value, rng)
    text = json.dumps(value)
    if how < 0.15:
        deep = rng.choice(("[" * NESTED, "[" * NESTED + "]" * NESTED, '{"a":' * NESTED))
        text = text.replace(rng.choice(("1", '""', "null", "}", "]")), deep, 1)
    return text.encode()


def check_case(
    damage: Callable[[Random], object], read: Callable[[], object], *, seed: object
) -> str:
    """One case: "result", or the name of the error that `read` ended in after `damage`."""
    damage(Random(str(seed)))
    try:
        read()
    except QlrlError as error:
        assert str(error).strip(), f"case {seed}: {type(error).__name__} without a message"
        return type(error).__name__
    except BaseException as error:
        error.add_note(f"fuzz: this was the case of seed {seed!r}")
        raise
    return "result"


def check_cases(
    damage: Callable[[Random], object], read: Callable[[], object], *, cases: int
) -> Counter[str]:
    """How many of the cases 0 ... cases - 1 ended in what."""
    return Counter(check_case(damage, read, seed=seed) for seed in range(cases))
