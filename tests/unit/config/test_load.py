"""Config files and overrides from outside: what is filled in, what is refused, and how."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_qlrl.config.checks import check_files
from megatron_qlrl.config.load import load_config, save_config
from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import ConfigError

PHASES = [{"name": "one", "max_input_tokens": 100, "steps": 2}]


def write(folder: Path, **sections: Any) -> Path:
    path = folder / "config.yaml"
    tree = {"model": {"path": "m"}, "rollout": {"max_response_tokens": 50}} | sections
    path.write_text(yaml.safe_dump(tree))
    return path


def test_references_to_settings_are_filled_in(tmp_path: Path) -> None:
    path = write(tmp_path, run={"dir": "runs/${run.name}", "name": "x"})
    config = load_config(path, ["model.path=${run.dir}/hf", "logging.project=a:b"])
    assert (config.run.dir, config.model.path) == ("runs/x", "runs/x/hf")
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:CANARY}",
        "a/${oc.env:CANARY,none}/b",
        "${ oc.env:CANARY}",
        "${${run.dir}:CANARY}",  # with run.dir=oc.env
        "${oc.decode:'7'}",
        "${run.${run.name}}",
    ],
)
@pytest.mark.parametrize("way", ["file", "override", "list"])
def test_nothing_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, way: str
) -> None:
    monkeypatch.setenv("CANARY", "secret-4711")
    sections: dict[str, Any] = {"run": {"dir": "oc.env"}}
    overrides = []
    if way == "file":
        sections["logging"] = {"project": text}
    elif way == "override":
        overrides = [f"logging.project={text}"]
    else:
        sections["data"] = {"train_files": ["a", text]}
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, **sections), overrides)
    where = "data.train_files.1" if way == "list" else "logging.project"
    assert f"{where}: " in str(caught.value)
    assert "is no plain reference to a setting" in str(caught.value)
    assert "secret-4711" not in str(caught.value)


NAMES = ["../../../x", "a/b", "..", ".", "", "a\0", "a b", "a\n", "x" * 101, "/etc/x"]


@pytest.mark.parametrize("name", [*NAMES, "start", "step_12"])
def test_names_of_phases_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a file name in <run.dir>/eval"):
        load_config(write(tmp_path, phases=[PHASES[0] | {"name": name}]))


@pytest.mark.parametrize("name", ["60k", "größe_1.5-b", "...", "starting"])
def test_names_of_phases_that_are_allowed(tmp_path: Path, name: str) -> None:
    assert load_config(write(tmp_path, phases=[PHASES[0] | {"name": name}])).phases[0].name == name


def test_two_phases_have_two_names(tmp_path: Path) -> None:
    path = write(tmp_path, phases=[*PHASES, PHASES[0] | {"max_input_tokens": 200}])
    with pytest.raises(ConfigError, match=r"a name of its own; twice: \['one'\]"):
        load_config(path)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"advantage_std": "task", "advantage": "rloo"}, "advantage_std=task needs .*=grpo: rloo"),
        ({"entropy_band": [2.0, 1.0]}, r"entropy_band=\[2, 1\] must be \[low, high\]"),
        ({"entropy_band": [0.0, 1.0]}, r"entropy_band=\[0, 1\] must be"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, algorithm: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, phases=PHASES, algorithm=algorithm))


@pytest.mark.parametrize("share", [0, -1, ".inf", ".nan"])
def test_shares_of_tasks_are_above_zero_and_finite(tmp_path: Path, share: Any) -> None:
    curriculum = {"tasks": {"docmath": float(str(share).strip(".")), "*": 1}}
    with pytest.raises(ConfigError, match="curriculum.tasks.docmath"):
        load_config(write(tmp_path, phases=PHASES, curriculum=curriculum))


def test_a_kl_term_needs_the_reference_in_every_step(tmp_path: Path) -> None:
    algorithm = {"kl_coef": 0.1, "reference_every": 2}
    with pytest.raises(ConfigError, match="reference_every=2 needs algorithm.kl_coef=0"):
        load_config(write(tmp_path, phases=PHASES, algorithm=algorithm))
    load_config(write(tmp_path, phases=PHASES, algorithm=algorithm | {"kl_coef": 0.0}))


@pytest.mark.parametrize("stem", ["a b", "x" * 101, "a:b"])
def test_names_of_benchmarks(tmp_path: Path, stem: str) -> None:
    file = tmp_path / f"{stem}.parquet"
    file.touch()
    config = Config.model_validate({"model": {"path": "m"}, "data": {"eval_files": [str(file)]}})
    with pytest.raises(ConfigError, match="is no name of letters, digits"):
        check_files(config, "eval")


DEPTH = 30_000


@pytest.mark.parametrize(
    "text",
    [
        "model: " + "[" * DEPTH,
        "model: " + "[" * DEPTH + "]" * DEPTH,
        "{a: " * DEPTH + "}" * DEPTH,
        "model: {path: m}\nphases: " + "[" * 300 + "]" * 300,
    ],
)
def test_deep_nesting_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml: "):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "override",
    [".".join("a" * DEPTH) + "=1", "model.path=" + "[" * DEPTH, "model=" + "{a: " * DEPTH],
)
def test_deep_overrides_are_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override") as caught:
        load_config(write(tmp_path), [override])
    assert len(str(caught.value)) < 1000


def test_values_that_stand_for_billions_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="has more than 100000 values"):
        load_config(tmp_path / "c.yaml")


def test_anchors_are_as_good_as_before(tmp_path: Path) -> None:
    text = "model: {path: &p m}\nrun: {dir: *p}\ndata: {eval_files: &f [a], train_files: *f}\n"
    (tmp_path / "c.yaml").write_text(text)
    config = load_config(tmp_path / "c.yaml")
    assert (config.run.dir, config.data.train_files) == ("m", ("a",))


def test_a_folder_stands_for_its_config_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"config file {tmp_path}/config.yaml does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {path: x}\n")
    assert load_config(tmp_path).model.path == "x"
