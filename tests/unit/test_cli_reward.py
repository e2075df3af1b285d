"""`qlrl reward score`, and the judge's check before a run."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from judge_server import MODEL, FakeJudge, running
from typer.testing import CliRunner

from megatron_qlrl import cli
from megatron_qlrl.errors import ConfigError, DataError, RewardError


def invoke(*argv: object) -> Any:
    return CliRunner().invoke(cli.app, ["reward", "score", *map(str, argv)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    row = {"data_source": "musique", "question": "Which city?", "ground_truth": "Paris"}
    answers = ("Paris", "Paname", "Rome")
    lines = [json.dumps(row | {"response": f"</think>the answer is {a}"}) for a in answers]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rules_alone(file: Path, tmp_path: Path) -> None:
    result = invoke(file, "--no-judge", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].split() == ["all", "3", "1", "0", "0", "0", "33.3%"]
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["score"] for r in written] == [1.0, 0.0, 0.0]


def test_the_models_template_says_whether_reasoning_must_be_closed(tmp_path: Path) -> None:
    row = {"data_source": "musique", "question": "Which city?", "ground_truth": "Paris"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row | {"response": "the answer is Paris"}) + "\n")
    base = Path(__file__).parents[2] / "examples" / "quickstart" / "base"  # opens <think>

    def share(*options: object) -> str:
        result = invoke(path, "--no-judge", *options)
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()[-1].split()[-1]

    assert share("--model", base) == share("--reasoning", "required") == "0.0%"
    assert share("--reasoning", "optional") == "100.0%"
    unsaid = invoke(path, "--no-judge").exception
    assert isinstance(unsaid, ConfigError)
    assert "--reasoning optional" in str(unsaid)


def test_with_a_judge_and_its_key(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "canary-4711")
    with running(FakeJudge(key="canary-4711")) as server:
        judge = ("--judge-url", server.url, "--judge-model", MODEL)
        result = invoke(file, *judge, "--judge-key-env", "SOME_KEY")
        refused = invoke(file, *judge)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].split() == ["all", "3", "1", "2", "1", "0", "66.7%"]
    assert "canary" not in result.output
    assert isinstance(refused.exception, RewardError)
    assert "HTTP 401" in str(refused.exception)


def test_bad_rows_give_exit_code_1_and_the_rest_is_scored(file: Path) -> None:
    with file.open("a") as stream:
        stream.write("{]\n")
    result = invoke(file, "--no-judge")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].split()[:2] == ["all", "3"]
    assert f"{file}:4: not readable as JSON" in result.stderr
    assert "1 row(s) could not be scored" in result.stderr


def test_what_cannot_be_used_at_all(file: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    for argv, kind, message in (
        ((tmp_path / "no.jsonl", "--no-judge"), DataError, "does not exist"),
        ((file, "--no-judge", "--out", tmp_path), ConfigError, "cannot be written"),
        ((file, "--no-judge", "--out", file), ConfigError, "the same file as the input"),
        ((file, "--judge-url", dead), RewardError, "qlrl judge serve"),
        ((file, "--judge-url", "localhost:8000"), ConfigError, "not of the form http://host"),
        ((file, "--judge-key-env", "NO_SUCH_KEY"), ConfigError, "NO_SUCH_KEY, which is not set"),
    ):
        result = invoke(*argv)
        assert isinstance(result.exception, kind), result.output
        assert message in str(result.exception)


@pytest.mark.parametrize("content", [None, "", "\n", "{]\n[]\n"])
def test_without_a_readable_row_the_old_output_stays(tmp_path: Path, content: str | None) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    out.write_text("earlier")
    if content is not None:
        file.write_text(content)
    result = invoke(file, "--no-judge", "--out", out)
    assert isinstance(result.exception, DataError), result.output
    message = "does not exist" if content is None else "holds no row that can be scored"
    assert f"{file} {message}" in str(result.exception)
    assert ":1: not readable as JSON" in str(result.exception) or content != "{]\n[]\n"
    assert out.read_text() == "earlier"


def test_the_input_stays_when_it_is_named_as_output(file: Path) -> None:
    before = file.read_text()
    (file.parent / "x").mkdir()
    invoke(file, "--no-judge", "--out", file.parent / "x" / ".." / file.name)
    assert file.read_text() == before


def test_an_interrupt_leaves_no_file_and_no_stack_trace(tmp_path: Path) -> None:
    row = {"data_source": "musique", "question": "?", "ground_truth": "Paris"}
    line = json.dumps(row | {"response": "</think>the answer is Paris"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(line * 400_000)
    out = tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_qlrl", "reward", "score", tmp_path / "rows.jsonl"]
        + ["--no-judge", "--out", out / "scored.jsonl"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(out.iterdir()):
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert list(out.iterdir()) == []


def test_own_rewards_by_option(file: Path, tmp_path: Path) -> None:
    own = "musique=tests.unit.reward.own_rewards:share"
    result = invoke(file, "--no-judge", "--custom", own, "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    # The letters of Paris in "the answer is Paris", "... Paname" and "... Rome", which have "ris".
    assert [r["score"] for r in written] == [1.0, 1.0, 0.8]
    assert invoke(file, "--no-judge", "--custom", "musique").exit_code != 0
