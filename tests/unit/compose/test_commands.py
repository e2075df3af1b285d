"""What a run of some phases takes from the config of the whole run, and what from its own."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_qlrl.compose import commands
from megatron_qlrl.compose.stretch import stretch_at
from megatron_qlrl.config.schema import FIXED, OVERRIDABLE, Config
from megatron_qlrl.platform.stop import StopSignals
from megatron_qlrl.types import Prompt

pytestmark = pytest.mark.usefixtures("lone_group")


class Whole(Config):
    """The config of a whole run, from which nothing may be read that a phase can change."""

    def __getattribute__(self, name: str) -> Any:
        assert name not in OVERRIDABLE, f"{name} is read from the config of the whole run"
        return super().__getattribute__(name)


class FakeRun:
    """Trains nothing; notes the curriculum, and lets every other call do nothing."""

    def __init__(self) -> None:
        self.curriculum: Any = None
        self.folder = Path("r")
        self.progress = SimpleNamespace(doing=lambda _: nullcontext())
        self.policy = self.evaluation = self.store = SimpleNamespace(
            keep_reference=lambda: None, before_training=lambda _: None, wait=lambda: None
        )

    def sampler(self, curriculum: Any) -> None:
        self.curriculum = curriculum

    def restore(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}

    def watched(self, _: Any) -> Iterator[Any]:
        return iter(())

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def test_what_a_phase_can_change_is_read_from_its_own_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A setting that is read from the whole run's config is one that phases change in vain."""
    own = {"curriculum": {"carry": "unsolved", "difficulty_eps": 0.5, "max_difficulty": 3.0}}
    phases = [
        {"name": f"p{k}", "max_input_tokens": 10 * (k + 1), "steps": 2, "overrides": overrides}
        for k, overrides in enumerate(({}, own))
    ]
    config = Config.model_validate({"model": {"path": "m"}, "phases": phases})
    whole = Whole.model_construct(**dict(config))
    prompts = [Prompt(f"f:{n}", np.zeros(n, np.int32), "docqa", "?", "!") for n in (5, 15)]
    run = FakeRun()

    @contextmanager
    def open_run(*_: Any, **__: Any) -> Iterator[FakeRun]:
        yield run

    monkeypatch.setattr(commands, "open_run", open_run)
    monkeypatch.setattr(commands, "read_train_prompts", lambda whole, *_, **__: (prompts, ""))
    commands._run_stretch(whole, stretch_at(config, 2), None, StopSignals(None))
    settings = run.curriculum._carried._config
    assert settings.model_dump() == own["curriculum"] | {"carried_share": 0.0}


def test_settings_that_no_phase_may_change_exist() -> None:
    for name in FIXED:
        section, _, key = name.partition(".")
        assert section in OVERRIDABLE
        assert key in type(Config.model_fields[section].default).model_fields
