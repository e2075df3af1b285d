"""Overrides of single phases: applied, checked like any other setting, refused where they cannot
be changed."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from megatron_qlrl.config.checks import smallest_world_size
from megatron_qlrl.config.load import load_config, save_config
from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import ConfigError


def write(folder: Path, overrides: dict[str, Any], **sections: Any) -> Path:
    tree = {
        "model": {"path": "m"},
        "phases": [
            {"name": "short", "max_input_tokens": 100, "steps": 2},
            {"name": "long", "max_input_tokens": 900, "steps": 3, "overrides": overrides},
        ],
        "rollout": {"max_response_tokens": 50},
        "policy": {"max_tokens_per_row": 160},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree | sections))
    return path


FITS = {"max_tokens_per_row": 1000}


def test_each_phase_has_its_own_settings(tmp_path: Path) -> None:
    overrides = {"policy": FITS | {"cp": 2}, "optimizer": {"lr": 1e-7}, "rollout": {"tp": 3}}
    config = load_config(write(tmp_path, overrides), ["phases.1.overrides.policy.tp=4"])
    short, long = config.phase_configs()
    assert (short.policy.cp, short.policy.max_tokens_per_row, short.optimizer.lr) == (1, 160, 2e-6)
    assert (long.policy.cp, long.policy.max_tokens_per_row, long.optimizer.lr) == (2, 1000, 1e-7)
    assert (long.policy.tp, long.rollout.max_response_tokens) == (4, 50)
    assert (short.max_input_tokens, long.max_input_tokens) == (100, 900)
    assert smallest_world_size([short, long]) == 24  # of 1, 8 and 3
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


def test_without_phases_the_config_is_its_own() -> None:
    config = Config.model_validate({"model": {"path": "m"}})
    assert config.phase_configs() == [config]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"policy": FITS | {"tpp": 2}}, ["phases.1.overrides", "'policy.tpp'", "mean 'tp'"]),
        ({"policy": FITS | {"cp": 0}}, ["phases.1.overrides", "policy.cp", "greater than 0"]),
        ({"policy": {"cp": 2}}, ["phases.1.overrides", "max_tokens_per_row=160", "900 + 50"]),
        ({"model": {"path": "x"}}, ["cannot change model", "policy, rollout, algorithm"]),
        ({"policy": {"distributed_optimizer": False}}, ["the same in all phases"]),
        ({"optimizer": {"warmup_steps": 9}}, ["optimizer.warmup_steps", "the run's first step"]),
        ({"curriculum": {"tasks": {"*": 1}}}, ["curriculum.tasks", "the pools of all phases"]),
        ({"policy": 3}, ["phases.1.overrides.policy", "a section"]),
    ],
)
def test_wrong_overrides(tmp_path: Path, overrides: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, overrides))
    for text in expected:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "effective"),
    [
        ({}, False),
        ({"generation_rounds": 3}, False),  # rounds alone stop at a full batch
        ({"incomplete_batch": "skip"}, False),  # with one round no batch counts as incomplete
        ({"oversampling": 1.5}, True),
        ({"incomplete_batch": "skip", "generation_rounds": 3}, True),
    ],
)
def test_staleness_without_surplus_is_refused(
    tmp_path: Path, algorithm: dict[str, Any], effective: bool
) -> None:
    path = write(tmp_path, {}, policy=FITS, algorithm={"max_staleness": 2} | algorithm)
    if effective:
        assert load_config(path).algorithm.max_staleness == 2
    else:
        with pytest.raises(ConfigError, match="max_staleness=2 has no effect: .*oversampling"):
            load_config(path)


@pytest.mark.parametrize(
    ("algorithm", "enough"),
    [
        ({}, False),
        ({"max_staleness": 1}, True),
        ({"max_staleness": 1, "updates_per_step": 2}, False),
        ({"max_staleness": 2, "updates_per_step": 2}, True),
    ],
)
def test_a_budget_of_tokens_needs_groups_that_may_wait(
    tmp_path: Path, algorithm: dict[str, Any], enough: bool
) -> None:
    rollout = {"max_response_tokens": 50, "tokens_per_round": 5}
    path = write(tmp_path, {}, policy=FITS, rollout=rollout, algorithm=algorithm)
    if enough:
        assert load_config(path).rollout.tokens_per_round == 5
    else:
        updates = algorithm.get("updates_per_step", 1)
        with pytest.raises(
            ConfigError, match=f"tokens_per_round=5 needs .*max_staleness of .*={updates}, but it"
        ):
            load_config(path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"checkpoint": {"keep_best": True}}, "keep_best needs held-out scores; set data.eval_f"),
        ({"evaluation": {"patience": 2}}, "patience needs held-out scores; set data.eval_files"),
        ({"checkpoint": {"release": "best"}}, "release=best needs checkpoint.keep_best=true"),
    ],
)
def test_the_best_needs_scores_to_choose_by(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, {}, policy=FITS, **sections)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_overlong_buffer_must_fit_the_response(tmp_path: Path) -> None:
    path = write(tmp_path, {}, policy={}, algorithm={"overlong_buffer_tokens": 51})
    with pytest.raises(ConfigError, match="overlong_buffer_tokens=51 is longer than .*=50"):
        load_config(path)
    assert load_config(path, ["algorithm.overlong_buffer_tokens=50"])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"policy": {"offload_activations": True}}, "needs policy.recompute=full"),
        ({"optimizer": {"offload": True}, "model": {"dtype": "float32"}}, "the model's own"),
    ],
)
def test_what_cannot_wait_in_host_memory(sections: dict[str, Any], message: str) -> None:
    model = {"path": "m"} | sections.get("model", {})
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(sections | {"model": model})


def test_off_is_a_word(tmp_path: Path) -> None:
    """YAML reads a bare `off` as false, and messages tell users to set it."""
    path = write(tmp_path, {"policy": FITS | {"fp8": "e4m3"}}, logging={"wandb": "offline"})
    bare = ["policy.fp8=off", "phases.1.overrides.policy.fp8=off", "logging.wandb=off"]
    config = load_config(path, bare)
    assert config.phase_configs()[1].policy.fp8 == config.policy.fp8 == "off"
    assert config.logging.wandb == "off"
