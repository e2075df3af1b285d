"""What a run of some phases takes from the config of the whole run, and what from its own; what a
refused run leaves, and which errors end a run with a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_policy import FakePolicy

from megatron_qlrl import build, errors
from megatron_qlrl.config.schema import FIXED, OVERRIDABLE, Config
from megatron_qlrl.platform.progress import Progress
from megatron_qlrl.train.phases import phase_group_at
from megatron_qlrl.types import Prompt

pytestmark = pytest.mark.usefixtures("lone_group")


class Whole(Config):
    """The config of a whole run, from which nothing may be read that a phase can change."""

    def __getattribute__(self, name: str) -> Any:
        assert name not in OVERRIDABLE, f"{name} is read from the config of the whole run"
        return super().__getattribute__(name)


def test_what_a_phase_can_change_is_read_from_its_own_config() -> None:
    """A setting that is read from the whole run's config is one that phases change in vain."""
    own = {"curriculum": {"carry": "unsolved", "difficulty_eps": 0.5, "max_difficulty": 3.0}}
    phases = [
        {"name": f"p{k}", "max_input_tokens": 10 * (k + 1), "steps": 2, "overrides": overrides}
        for k, overrides in enumerate(({}, own))
    ]
    config = Config.model_validate({"model": {"path": "m"}, "phases": phases})
    whole = Whole.model_construct(**dict(config))
    prompts = [Prompt(f"f:{n}", np.zeros(n, np.int32), "docqa", "?", "!") for n in (5, 15)]
    nothing: Any = None
    job = build.Job(
        config=phase_group_at(config, 2).config,
        whole=whole,
        shape=nothing,
        context=nothing,
        tokenizer=nothing,
        progress=nothing,
    )
    sampler = build.make_sampler(job, prompts)
    settings = sampler.curriculum._carried._config
    assert settings.model_dump() == own["curriculum"] | {"carried_share": 0.0, "tasks": {}}
    assert [len(pool) for pool in sampler.curriculum._pools] == [1, 1]


def test_settings_that_no_phase_may_change_exist() -> None:
    for name in FIXED:
        section, _, key = name.partition(".")
        assert section in OVERRIDABLE
        assert key in type(Config.model_fields[section].default).model_fields


class FakeRecorder:
    """Notes what is asked of it."""

    calls: list[str]

    def __init__(self, **_: Any) -> None:
        FakeRecorder.calls = []

    def save(self) -> None:
        self.calls.append("save")

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`open_run` of a job that has a fingerprint and a policy already."""

    @contextmanager
    def open_model(*_: Any, **__: Any) -> Iterator[build.Model]:
        anything: Any = FakePolicy()
        yield build.Model(anything, anything, anything)

    monkeypatch.setattr(build, "_fingerprint", lambda *_: {})
    monkeypatch.setattr(build, "open_model", open_model)
    monkeypatch.setattr(build, "Recorder", FakeRecorder)

    def opened(**reward: Any) -> Any:
        run = {"dir": str(tmp_path)}
        config = Config.model_validate({"model": {"path": "m"}, "run": run, "reward": reward})
        shape: Any = SimpleNamespace(max_positions=100)
        job = build.Job(
            config=config,
            whole=config,
            shape=shape,
            context=FakePolicy().context,  # pyright: ignore[reportArgumentType]
            tokenizer=None,
            progress=Progress(lambda _: None),
        )
        stop: Any = SimpleNamespace(within_step=lambda: "")
        return build.open_run(
            job, "rl", newest=None, rows="", stop=stop, total_steps=1, temperature=1.0
        )

    return opened


def test_a_run_without_the_judges_key_leaves_nothing(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QLRL_NO_KEY", raising=False)
    judge = {"urls": ["http://127.0.0.1:1/v1"], "model": "j", "api_key_env": "QLRL_NO_KEY"}
    with pytest.raises(errors.ConfigError, match="export QLRL_NO_KEY"), opened(judge=judge):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_well_saves_nothing_more(opened: Any, tmp_path: Path) -> None:
    with opened() as (model, run):
        assert model.policy.calls == ["optimizer at hand", "fresh moments"]
        assert run.recorder.calls == []
        assert (tmp_path / "config.yaml").is_file()
    assert FakeRecorder.calls == ["finish"]


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (errors.StopRequested, ["save", "finish"]),
        (errors.RewardError, ["save", "finish"]),
        (errors.StabilityError, ["save", "finish"]),
        # A save that failed would fail again; after any other error the ranks may disagree.
        (errors.CheckpointError, []),
        (errors.SyncError, []),
        (RuntimeError, []),
    ],
)
def test_which_errors_end_a_run_with_a_checkpoint(
    opened: Any, error: type[Exception], calls: list[str]
) -> None:
    with pytest.raises(error, match="why"), opened():
        raise error("why")
    assert FakeRecorder.calls == calls
