"""What reaches a layer's set_extra_state, which Transformer Engine unpickles."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.weights.megatron_format import _load_model

pytestmark = pytest.mark.usefixtures("lone_group")
LEAVE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
PICKLES = [torch.ones(3, dtype=torch.uint8), io.BytesIO(b"pickle")]


class FakeModel:
    def __init__(self, fp8: str | None, recipe: str) -> None:
        self.config = SimpleNamespace(fp8=fp8, fp8_recipe=recipe)
        self.loaded: dict[str, Any] = {}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.loaded = dict(values)


@pytest.mark.parametrize("state", PICKLES)
@pytest.mark.parametrize("settings", [(None, "delayed"), ("e4m3", "blockwise")])
def test_state_that_nobody_needs_is_left_aside(state: Any, settings: Any) -> None:
    model, weight = FakeModel(*settings), torch.ones(2)
    _load_model(model, {"a.weight": weight, "a._extra_state": state, "b._extra_state": None})
    assert model.loaded["a.weight"] is weight
    assert model.loaded["a._extra_state"].numel() == 0
    assert model.loaded["b._extra_state"] is None


@pytest.mark.parametrize("state", PICKLES)
def test_state_that_is_needed_takes_the_users_leave(
    monkeypatch: pytest.MonkeyPatch, state: Any
) -> None:
    model = FakeModel("hybrid", "delayed")
    monkeypatch.delenv(LEAVE, raising=False)
    with pytest.raises(CheckpointError, match=rf"\(a\._extra_state\).*set {LEAVE}=1"):
        _load_model(model, {"a._extra_state": state})
    assert model.loaded == {}
    _load_model(model, {"a._extra_state": torch.empty(0, dtype=torch.uint8)})  # nothing to run
    monkeypatch.setenv(LEAVE, "1")
    _load_model(model, {"a._extra_state": state})
    assert model.loaded == {"a._extra_state": state}
