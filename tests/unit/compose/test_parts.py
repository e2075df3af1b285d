"""What stops a run: a batch without verdicts, a checkpoint that is not its own. The judge's
metrics over all ranks."""

import json
import shutil
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from fuzz import check_cases, mutate_json

from megatron_qlrl.compose.parts import (
    check_masked,
    check_resumable,
    check_vocabulary,
    judge_metrics,
    load_tokenizer,
    newest_checkpoint,
    stop_tokens,
)
from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import CheckpointError, ConfigError, RewardError
from megatron_qlrl.types import Prompt, Score, ScoredGroup
from megatron_qlrl.weights.checkpoint_folder import FORMAT

BASE = Path(__file__).resolve().parents[3] / "examples" / "quickstart" / "base"


def group(*values: float | None) -> ScoredGroup:
    prompt = Prompt("f:0", np.zeros(1, np.int32), "musique", "?", "!")
    return ScoredGroup(prompt, (), tuple(Score(v, v or 0.0) for v in values))


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


@pytest.mark.parametrize(
    ("share", "stops"), [(0.0, True), (0.24, True), (0.25, False), (1.0, False)]
)
def test_a_share_above_the_limit_stops(share: float, stops: bool) -> None:
    groups = [group(1.0, None, 0.0, 0.0), group(1.0, None, 1.0, 0.0)]
    if not stops:
        check_masked(groups, max_share=share, reason="")
        return
    with pytest.raises(RewardError, match=r"2 of 8 responses.*\(http://j: gone\).*resumes"):
        check_masked(groups, max_share=share, reason="http://j: gone")


def test_without_masked_samples_nothing_stops() -> None:
    check_masked([group(0.0, 0.0)], max_share=0.0, reason="")


def test_metrics_are_summed_over_ranks_and_latency_is_a_mean() -> None:
    names = ("asked", "cached", "yes", "failed", "replies", "latency_s")
    one = dict(zip(names, (8, 2, 3, 1, 5, 2.0), strict=True))
    two = dict(zip(names, (4, 0, 1, 0, 3, 0.4), strict=True))
    assert judge_metrics([one, two]) == pytest.approx(
        {
            "reward/judge/asked": 12,
            "reward/judge/cached": 2,
            "reward/judge/yes": 4,
            "reward/judge/failed": 1,
            "reward/judge/latency_s": 0.3,
        }
    )
    nothing = dict.fromkeys(names, 0.0)
    assert judge_metrics([nothing])["reward/judge/latency_s"] == 0


def checkpoint_of(run: Path, **state: Any) -> Path:
    return write_checkpoint(run / "checkpoints" / "step_00000003", state)


def config_of(run: Path) -> Config:
    return Config.model_validate({"model": {"path": "m"}, "run": {"dir": str(run)}})


def test_run_goes_on_from_a_checkpoint_of_its_own(tmp_path: Path, lone_group: Any) -> None:
    assert newest_checkpoint(config_of(tmp_path), "rl") is None
    folder = checkpoint_of(tmp_path, format=FORMAT, command="rl")
    assert newest_checkpoint(config_of(tmp_path), "rl") == folder


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"format": FORMAT, "command": "sft"}, "a run of `qlrl sft`, which `qlrl rl` cannot"),
        ({"format": FORMAT, "command": "import"}, "a run of `qlrl import`, which `qlrl rl` cannot"),
        ({"command": "rl"}, f"has format 1, this version of megatron_qlrl reads {FORMAT}"),
        ({"format": 99, "command": "rl"}, "has format 99"),
        (
            {"format": FORMAT},
            r"does not hold the state that this run needs \(KeyError: 'command'\)",
        ),
    ],
)
def test_run_does_not_go_on_from_another_one(
    tmp_path: Path, lone_group: Any, state: dict[str, Any], message: str
) -> None:
    checkpoint_of(tmp_path, **state)
    with pytest.raises(CheckpointError, match=message):
        newest_checkpoint(config_of(tmp_path), "rl")


def test_delayed_fp8_scaling_needs_leave_to_read_its_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def config(**policy: str) -> Config:
        return Config.model_validate({"model": {"path": "m"}, "policy": policy})

    monkeypatch.delenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", raising=False)
    check_resumable(config(fp8="e4m3"))
    check_resumable(config(fp8_recipe="delayed"))
    with pytest.raises(ConfigError, match="Set NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1 in"):
        check_resumable(config(fp8="hybrid", fp8_recipe="delayed"))
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    check_resumable(config(fp8="hybrid", fp8_recipe="delayed"))
