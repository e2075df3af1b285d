"""The damage that readers are tested with: of every kind, and the same for the same seed."""

import json
from random import Random
from typing import Any

import pytest
from fuzz import check_case, check_cases, mutate, mutate_bytes, mutate_json

from megatron_qlrl.errors import ConfigError

VALUE: dict[str, Any] = {"a": [1, {"b": None}], "c": "text"}


def test_each_case_changes_a_copy_in_its_own_way() -> None:
    before = json.dumps(VALUE)
    found = {repr(mutate(VALUE, Random(seed))) for seed in range(2000)}
    assert json.dumps(VALUE) == before
    assert len(found) > 100
    assert repr({"c": "text"}) in found  # removed
    assert repr({"a": VALUE["a"], "C": "text"}) in found  # moved to another name
    assert repr({"a": [1, 1, {"b": None}], "c": "text"}) in found  # doubled
    assert repr({"a": VALUE["a"], "c": VALUE["a"]}) in found  # replaced by another part


def test_documents_are_also_damaged_as_bytes_and_nested_too_deeply() -> None:
    raw = json.dumps(VALUE).encode()
    kinds = set()
    for seed in range(300):
        assert mutate_json(raw, Random(seed)) == mutate_json(raw, Random(seed))
        try:
            json.loads(mutate_json(raw, Random(seed)))
        except (ValueError, RecursionError) as error:
            kinds.add(type(error).__name__)
    assert kinds == {"JSONDecodeError", "RecursionError", "UnicodeDecodeError"}
    assert len({mutate_bytes(raw, Random(seed)) for seed in range(300)}) > 200


def test_a_reader_gives_a_result_or_a_named_error() -> None:
    state: dict[str, float] = {}

    def damage(rng: Random) -> None:
        state["x"] = rng.random()

    def read() -> None:
        if state["x"] < 0.3:
            raise ConfigError("x is too small; make it larger")

    counts = check_cases(damage, read, cases=200)
    assert counts.keys() == {"ConfigError", "result"}
    assert sum(counts.values()) == 200

    def crash() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        check_case(damage, crash, seed=5)
    assert caught.value.__notes__ == ["fuzz: this was the case of seed 5"]

    def mute() -> None:
        raise ConfigError("")

    with pytest.raises(AssertionError, match="case 6: ConfigError without a message"):
        check_case(damage, mute, seed=6)
