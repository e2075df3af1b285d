"""Whether a run's checkpoints can be read again."""

import pytest

from megatron_qlrl.config.schema import PolicyConfig
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.weights.checkpoint_folder import check_resumable


def test_delayed_fp8_scaling_needs_leave_to_read_its_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def config(**policy: str) -> PolicyConfig:
        return PolicyConfig.model_validate(policy)

    monkeypatch.delenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", raising=False)
    check_resumable(config(fp8="e4m3"))
    check_resumable(config(fp8_recipe="delayed"))
    with pytest.raises(ConfigError, match="Set NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1 in"):
        check_resumable(config(fp8="hybrid", fp8_recipe="delayed"))
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    check_resumable(config(fp8="hybrid", fp8_recipe="delayed"))
