"""What a run of some phases takes from the config of the whole run, and what from its own."""

from typing import Any

import numpy as np

from megatron_qlrl import build
from megatron_qlrl.config.schema import FIXED, OVERRIDABLE, Config
from megatron_qlrl.train.phases import phase_group_at
from megatron_qlrl.types import Prompt


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
    assert settings.model_dump() == own["curriculum"] | {"carried_share": 0.0}
    assert [len(pool) for pool in sampler.curriculum._pools] == [1, 1]


def test_settings_that_no_phase_may_change_exist() -> None:
    for name in FIXED:
        section, _, key = name.partition(".")
        assert section in OVERRIDABLE
        assert key in type(Config.model_fields[section].default).model_fields
