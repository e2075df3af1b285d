"""What a command refuses before it does anything."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest
from fake_policy import BASE

from megatron_qlrl import commands
from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import ConfigError


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
