"""The command line up to the point where a run starts; `megatron_qlrl.commands` is a hand-written
fake here, so nothing loads torch."""

import socket
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import megatron_qlrl
from megatron_qlrl import cli
from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import CheckpointError, ConfigError, DataError
from megatron_qlrl.launch import local

MakeConfig = Callable[..., Path]


def write_rows(path: Path, *, rows: int = 1, without: str = "") -> None:
    names = {"data_source", "prompt", "reward_model", "response"} - {without}
    pq.write_table(pa.table({name: ["x"] * rows for name in sorted(names)}), path)


@pytest.fixture
def make_config(tmp_path: Path, fake_hf: Callable[..., Path]) -> MakeConfig:
    """A config file that passes every check, with sections added."""

    def make(**sections: Any) -> Path:
        train = tmp_path / "train.parquet"
        write_rows(train)
        tree = {
            "model": {"path": str(fake_hf())},
            "data": {"train_files": [str(train)], "sft_files": [str(train)]},
            "phases": [{"name": "one", "max_input_tokens": 100, "steps": 2}],
            "rollout": {"max_response_tokens": 50},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree | sections))
        return path

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What reached the composition root, in place of doing it."""
    made: list[tuple[Any, ...]] = []
    fake = types.ModuleType("megatron_qlrl.commands")
    for name in ("run_sft", "run_rl", "run_eval", "run_export", "run_import"):
        setattr(fake, name, lambda *args, name=name: made.append((name, *args)))
    monkeypatch.setitem(sys.modules, "megatron_qlrl.commands", fake)
    monkeypatch.setattr(megatron_qlrl, "commands", fake, raising=False)
    monkeypatch.setattr(local, "num_gpus", lambda: 0)
    return made


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """What would have been started; the fake ranks fail with code 7."""
    made: list[tuple[list[str], int]] = []

    def launch(argv: list[str], *, processes: int, saves: bool) -> int:
        assert saves == (argv[0] in ("sft", "rl"))
        made.append((argv, processes))
        return 7

    monkeypatch.setattr(local, "launch", launch)
    return made


def invoke(*argv: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in argv])


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_one_process_runs_here(
    command: str, make_config: MakeConfig, calls: list[Any], launches: list[Any]
) -> None:
    result = invoke(command, make_config(), "optimizer.lr=0.5")
    assert result.exit_code == 0, result.output
    assert launches == []
    [(name, config)] = calls
    assert name == f"run_{command}"
    assert isinstance(config, Config)
    assert config.optimizer.lr == 0.5


@pytest.mark.parametrize("step", ["", ":12"])
def test_from_is_the_setting_run_parent(
    make_config: MakeConfig, calls: list[Any], launches: list[Any], tmp_path: Path, step: str
) -> None:
    (tmp_path / "2024" / "checkpoints" / "step_00000012").mkdir(parents=True)
    path, parent = make_config(), f"{tmp_path}/2024{step}"
    assert invoke("rl", path, "--from", parent, "run.parent=other").exit_code == 0
    [(_, config)] = calls
    assert config.run.parent == parent
    invoke("rl", path, "--from", parent, "--processes", 2)
    assert launches == [(["rl", str(path), f'run.parent="{parent}"'], 2)]


def test_a_parent_that_is_not_there_is_refused_before_ranks_start(
    make_config: MakeConfig, calls: list[Any], launches: list[Any], tmp_path: Path
) -> None:
    path, setting = make_config(), f"run.parent={tmp_path}/none"
    message = f"run.parent: there is no folder {tmp_path}/none"
    result = invoke("rl", path, "--processes", 2, setting)
    assert (result.exit_code, calls, launches) == (2, [], [])
    assert result.stderr.startswith(f"qlrl: error: {message}")
    result = invoke("check", path, setting)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(message)


def test_several_processes_are_started_after_the_checks(
    make_config: MakeConfig, calls: list[Any], launches: list[Any]
) -> None:
    path = make_config()
    result = invoke("rl", path, "policy.tp=2", "--processes", 4, "run.seed=3")
    assert result.exit_code == 7
    assert launches == [(["rl", str(path), "policy.tp=2", "run.seed=3"], 4)]
    assert calls == []


def test_default_is_the_fewest_that_hold_the_layout(
    make_config: MakeConfig, calls: list[Any], launches: list[Any]
) -> None:
    invoke("rl", make_config(policy={"tp": 2, "pp": 3}))
    assert [processes for _, processes in launches] == [6]


def test_default_on_gpus_is_one_process_each(
    make_config: MakeConfig, calls: list[Any], launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "num_gpus", lambda: 8)
    invoke("rl", make_config())
    assert [processes for _, processes in launches] == [8]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")
    result = invoke("rl", make_config())
    assert (result.exit_code, len(launches)) == (2, 1)
    assert "the engine could not give its memory" in result.stderr


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
        {
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": "1",
            "SLURM_LOCALID": "1",
            "SLURM_NTASKS": "2",
        },
    ],
)
def test_under_torchrun_and_srun_nothing_is_started(
    environ: dict[str, str],
    make_config: MakeConfig,
    calls: list[Any],
    launches: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    result = invoke("rl", make_config(policy={"tp": 2}), "--processes", "2")
    assert result.exit_code == 0, result.output
    assert [name for name, *_ in calls] == ["run_rl"]
    assert launches == []


def test_bad_layout_starts_nothing(
    make_config: MakeConfig, calls: list[Any], launches: list[Any]
) -> None:
    result = invoke("rl", make_config(), "policy.tp=3", "--processes", "3")
    assert result.exit_code == 2
    assert result.stderr.startswith("qlrl: error: policy.tp=3 does not divide")
    assert result.stderr.count("\n") == 1
    assert (calls, launches) == ([], [])


def test_check_error_under_torchrun_is_shown_once_a_machine(
    make_config: MakeConfig, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_config()
    shown = []
    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
        for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", 4)):
            monkeypatch.setenv(name, str(value))
        result = invoke("rl", path, "policy.tp=8")
        assert result.exit_code == 2
        shown.append(result.stderr[:29])
    assert shown == ["qlrl: error: policy.tp=8 does", "", "qlrl: error: rank 2: policy.t", ""]


@pytest.mark.parametrize(
    ("rank", "message", "shown"),
    [
        ("0", "disk is full", "qlrl: error: disk is full\n"),
        ("1", "disk is full", "qlrl: error: rank 1: disk is full\n"),
        ("0", "rank 1: disk is full", "qlrl: error: rank 1: disk is full\n"),
        ("1", "rank 1: disk is full", ""),
    ],
)
def test_error_of_a_run(
    rank: str,
    message: str,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise DataError(message)

    monkeypatch.setattr(cli, "app", fail)
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == shown


def test_child_of_the_launcher_reports_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise DataError("disk is full")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setenv("QLRL_ERROR_DIR", str(tmp_path))
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == ""
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"1.error": "disk is full"}


def test_export(tmp_path: Path, calls: list[Any]) -> None:
    source, out = tmp_path / "step_2", tmp_path / "out"
    source.mkdir()
    assert invoke("export", source, out).exit_code == 0
    assert calls == [("run_export", source, out)]
    assert isinstance(invoke("export", tmp_path / "gone", out).exception, CheckpointError)
    out.mkdir()
    (out / "file").touch()
    error = invoke("export", source, out).exception
    assert isinstance(error, ConfigError)
    assert str(error) == f"{out} exists already; name a new folder or remove it"


def test_import(
    tmp_path: Path, fake_hf: Callable[..., Path], calls: list[Any], launches: list[Any]
) -> None:
    model, out = fake_hf(), tmp_path / "out"
    assert invoke("import", model, out).exit_code == 0
    assert calls == [("run_import", model, out, 1, 1)]
    assert invoke("import", model, out, "--tp", "2", "--pp", "3").exit_code == 7
    assert launches == [(["import", str(model), str(out), "--tp=2", "--pp=3"], 6)]
    result = invoke("import", model, out, "--pp", "4")
    assert result.exit_code == 2
    assert "policy.pp=4 does not divide" in result.stderr


def test_check_reports_the_machine_and_the_config(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "num_gpus", lambda: 0)
    report = invoke("check").stdout
    lines = dict(line.split(maxsplit=1) for line in report.splitlines())
    assert lines["python"] == ".".join(map(str, sys.version_info[:3]))
    assert lines["device"] == "CPU (no GPU found)"
    assert lines["megatron-core"] in ("0.16.1", "0.19.2")
    path = make_config(policy={"tp": 2})
    assert f"{path}: fits 2 process(es) on this machine" in invoke("check", path).stdout
    error = invoke("check", path, "policy.pp=5").exception
    assert isinstance(error, ConfigError)
    assert "policy.pp=5 does not divide" in str(error)


def test_module_prints_one_line_for_bad_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_qlrl", "rl", "gone.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "qlrl: error: config file gone.yaml does not exist; pass the path of a YAML file\n"
    )


def test_an_own_reward_that_cannot_be_used_stops_the_run_before_it_starts(
    make_config: MakeConfig, calls: list[Any], launches: list[Any]
) -> None:
    config = make_config(reward={"custom": {"toy": "no_such_module:f"}})
    result = invoke("rl", config, "--processes", 2)
    assert result.exit_code == 2
    assert "reward.custom: there is no module 'no_such_module'" in result.stderr
    assert calls == launches == []


def test_a_judge_that_does_not_answer_stops_the_run_before_it_starts(
    make_config: MakeConfig, calls: list[Any], launches: list[Any]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    result = invoke("rl", make_config(reward={"judge": {"urls": [url]}}), "--processes", 2)
    assert result.exit_code == 2
    assert f"the judge is not ready: {url}: " in result.stderr
    assert calls == launches == []


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"model": "x"}, "'reward.judge.urls' is required"),
        ({"urls": []}, "reward.judge.urls: Tuple should have at least 1 item"),
        ({"urls": ["judge:8000"]}, "'judge:8000' is not of the form http://host:8000/v1"),
        ({"urls": ["http://a:canary@h/v1"]}, "the URL of h carries a user, password or query"),
        ({"urls": ["http://h/v1?key=canary"]}, "the URL of h carries a user, password or query"),
        ({"urls": ["http://h/v1"], "api_key_env": "canary-1"}, "takes the NAME of an environment"),
        ({"urls": ["http://h/v1"], "api_key": "canary"}, "did you mean 'api_key_env'?"),
        ({"urls": ["http://h/v1"], "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY, which is not set"),
    ],
)
def test_judge_settings_that_are_wrong_never_show_a_key(
    make_config: MakeConfig, calls: list[Any], judge: dict[str, Any], message: str
) -> None:
    result = invoke("rl", make_config(reward={"judge": judge}))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "canary" not in result.output
    assert calls == []


@pytest.mark.parametrize(
    ("train", "out"),
    [
        ("train.parquet", "train.parquet"),
        ("train.parquet", "config.yaml"),
        ("sft.parquet.report.json", "sft.parquet"),  # what is written beside OUT counts too
    ],
)
def test_distill_overwrites_none_of_its_inputs(
    tmp_path: Path, make_config: MakeConfig, train: str, out: str
) -> None:
    write_rows(tmp_path / train)
    teacher = {"urls": ["http://127.0.0.1:9/v1"], "model": "t"}
    config = make_config(
        data={"train_files": [str(tmp_path / train)]}, distill={"teacher": teacher}
    )
    result = CliRunner().invoke(cli.app, ["distill", str(config), str(tmp_path / out)])
    assert isinstance(result.exception, ConfigError), result.output
    assert "the same file as the input" in str(result.exception)


@pytest.mark.parametrize("command", ["check", "sft", "rl", "eval"])
@pytest.mark.parametrize("damage", ["no rows", "no bytes", "no column"])
def test_data_files_are_looked_into_before_anything_starts(
    tmp_path: Path, make_config: MakeConfig, command: str, damage: str
) -> None:
    file = tmp_path / "other.parquet"
    write_rows(
        file,
        rows=0 if damage == "no rows" else 1,
        without="prompt" if damage == "no column" else "",
    )
    if damage == "no bytes":
        file.write_bytes(b"")
    name = {"sft": "sft_files", "eval": "eval_files"}.get(command, "train_files")
    result = CliRunner().invoke(cli.app, [command, str(make_config(data={name: [str(file)]}))])
    message = {
        "no rows": "has no rows",
        "no bytes": "cannot be read as a parquet file",
        "no column": "has no column prompt",
    }[damage]
    # The commands with ranks show it themselves.
    assert isinstance(result.exception, DataError) or result.exit_code == 2, result.output
    assert f"{file} {message}" in result.output + str(result.exception)
