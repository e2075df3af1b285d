"""What a command refuses before it does anything, and what a new run takes from its parent."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from fake_policy import BASE

from megatron_qlrl import commands
from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import CheckpointError, ConfigError
from megatron_qlrl.train.parent import Parent


def test_a_sample_is_refused_where_the_run_could_not_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", raising=False)
    policy = {"fp8": "hybrid", "fp8_recipe": "delayed"}
    config = Config.model_validate({"model": {"path": "m"}, "policy": policy})
    with pytest.raises(ConfigError, match="policy.fp8_recipe=delayed keeps a pickle"):
        commands.run_sample(config, 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_without_the_judges_key_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QLRL_NO_KEY", raising=False)
    judge = {"urls": ["http://127.0.0.1:1/v1"], "model": "j", "api_key_env": "QLRL_NO_KEY"}
    settings = {"model": {"path": str(BASE)}, "run": {"dir": str(tmp_path)}}
    config = Config.model_validate(settings | {"reward": {"judge": judge}})
    with patch.dict(os.environ), pytest.raises(ConfigError, match="export QLRL_NO_KEY"):
        commands.run_eval(config)
    assert list(tmp_path.iterdir()) == []


ROWS = {"contents": {"the training data, as the model sees it": "r"}}
RL = {"command": "rl", "fingerprint": ROWS, "sampler": {"curriculum": "what it has seen"}}


def start_from(state: dict[str, Any], *, rows: str = "r", optimizer: str = "keep") -> list[Any]:
    """What a run asks of its parts that starts from a parent in this state."""
    asked: list[Any] = []
    phase = {"name": "p", "max_input_tokens": 9, "steps": 1, "optimizer_state": optimizer}
    run = {"dir": "child", "parent": "/runs/base:4"}
    config = Config.model_validate({"model": {"path": "m"}, "run": run, "phases": [phase]})

    def load(path: Path, *, reference: Path) -> dict[str, Any]:
        asked.extend((str(path), str(reference)))
        return state

    def inherit(saved: Any) -> int:
        asked.append(saved)
        return 7

    parts: Any = SimpleNamespace(
        recorder=SimpleNamespace(start_from=load),
        curriculum=SimpleNamespace(inherit=inherit),
        whole=config,
        leads=True,
    )
    commands._start_from(Parent("/runs/base", 4, "d"), parts, parts, parts, rows)
    return asked


@pytest.mark.parametrize(
    ("state", "rows", "optimizer", "takes", "said"),
    [
        (RL, "r", "keep", True, "its optimizer state, statistics of 7 prompts"),
        (RL, "r", "reset", True, "a new optimizer state, statistics of 7 prompts"),
        (RL, "x", "keep", False, "its optimizer state, no statistics of prompts, because the tra"),
        (RL | {"fingerprint": {}}, "r", "keep", False, "no statistics of prompts, because the tr"),
        ({"command": "sft", "fingerprint": ROWS}, "r", "keep", False, "because SFT keeps none"),
    ],
)
def test_a_new_run_says_what_it_takes_from_its_parent(
    capsys: pytest.CaptureFixture[str],
    state: dict[str, Any],
    rows: str,
    optimizer: str,
    takes: bool,
    said: str,
) -> None:
    checkpoint = "/runs/base/checkpoints/step_00000004"
    asked = start_from(state, rows=rows, optimizer=optimizer)
    assert asked == [checkpoint, "child/references/phase_0", *["what it has seen"] * takes]
    line = capsys.readouterr().out
    assert line.startswith(f"qlrl: starts from {checkpoint}: its weights, ") and said in line


def test_a_parent_without_statistics_is_damaged() -> None:
    with pytest.raises(CheckpointError, match="does not hold the state"):
        start_from({"command": "rl", "fingerprint": ROWS})
