"""Tokenizers that fit their model, and those that do not."""

import json
import shutil
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from fuzz import check_cases, mutate_json

from megatron_qlrl.data.tokenizer import check_vocabulary, load_tokenizer, stop_tokens
from megatron_qlrl.errors import ConfigError

BASE = Path(__file__).resolve().parents[3] / "examples" / "quickstart" / "base"


class Tokenizer:
    name_or_path, pad_token_id = "folder", 5

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 3, "<pad>": 5, "<tool>": 4}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers_damaged_at_random(tmp_path: Path, fuzz_cases: int, name: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(BASE / file, tmp_path)
    raw = (BASE / name).read_bytes()

    def damage(rng: Random) -> None:
        (tmp_path / name).write_bytes(mutate_json(raw, rng))

    cases = fuzz_cases // 15  # each takes a tenth of a second
    counts = check_cases(damage, lambda: load_tokenizer(tmp_path), cases=cases)
    assert counts.keys() <= {"result", "ConfigError"}
    assert counts["ConfigError"] > 0


def test_end_tokens_of_tokenizer_and_generation_config(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(eos_token_id=7)
    assert stop_tokens(tmp_path, tokenizer) == [7]
    for ids, want in ((3, [3, 7]), ([9, 7, 2], [2, 7, 9]), (None, [7])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert stop_tokens(tmp_path, tokenizer) == want


def test_tokens_that_the_model_does_not_know() -> None:
    check_vocabulary(Tokenizer(), 5)  # the padding token alone lies beyond
    with pytest.raises(ConfigError, match=r"of 'folder' has 1 tokens .* vocab_size=4 .*'<tool>'"):
        check_vocabulary(Tokenizer(), 4)
