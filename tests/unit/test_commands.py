"""What a command refuses before it does anything."""

from pathlib import Path

import pytest

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
