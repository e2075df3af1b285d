"""`qlrl judge certify`, and a run that demands a certificate."""

import json
from pathlib import Path
from typing import Any

import pytest
from judge_server import MODEL, FakeJudge, Reply, running, verdict
from typer.testing import CliRunner

from megatron_qlrl import cli
from megatron_qlrl.cli.train import check_judge_of
from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import ConfigError, DataError, RewardError
from megatron_qlrl.reward.certificate import read_certificate
from megatron_qlrl.reward.extract import Answer
from megatron_qlrl.reward.rules import apply_rule

KEY = "canary-4711"


def by_rule(fields: dict[str, str]) -> Reply:
    """What the rules alone would say, as a judge; it accepts one answer too many."""
    accepts = apply_rule("qa", gold=fields["reference"], answer=Answer(fields["candidate"], ""))
    return verdict(accepts or fields["candidate"] in ("WTO", "The city of Paris."))


def invoke(*argv: object) -> Any:
    return CliRunner().invoke(cli.app, ["judge", "certify", *map(str, argv)])


def config(url: str, **judge: Any) -> Config:
    settings = {"urls": [url], "model": MODEL, "api_key_env": "SOME_KEY"} | judge
    return Config.model_validate({"model": {"path": "m"}, "reward": {"judge": settings}})


def test_a_judge_is_certified_and_a_run_demands_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One false positive among some 300, and no key anywhere."""
    monkeypatch.setenv("SOME_KEY", KEY)
    out = tmp_path / "certificate.json"
    with running(FakeJudge(by_rule, key=KEY)) as server:
        demand = config(server.url, certificate=str(out), max_false_positive=0.01)
        with pytest.raises(RewardError, match=r"certificate\.json cannot be read .* --key-env"):
            check_judge_of(demand)
        asked = len(server.asked)
        assert asked == 0  # refused before anything is asked

        options = ("--url", server.url, "--model", MODEL, "--key-env", "SOME_KEY", "--out", out)
        result = invoke(*options, "--repeats", 1)
        assert result.exit_code == 0, result.output
        check_judge_of(demand)
        strict = config(server.url, certificate=str(out), max_false_positive=0.001)
        with pytest.raises(RewardError, match=r"false positives are 0\.3% \(1 of 3"):
            check_judge_of(strict)
        with pytest.raises(RewardError, match="is of the model fake-judge"):
            check_judge_of(config(server.url, certificate=str(out), model="other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["certificate.json"]
    assert KEY not in result.output + out.read_text()
    certificate = read_certificate(out)
    assert (certificate.model, certificate.urls) == (MODEL, (server.url,))
    assert certificate.false_positives.wrong == 1
    lines = result.stdout.splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert table["abbreviation"][3] == "1"
    assert len([line for line in lines if line.startswith("accepted: ")]) == 1
    assert "accepted: 'WTO' for 'World Health Organization' (another organisation)" in lines
    assert any(line.startswith("the rule alone      false positives 0.0% (0 of ") for line in lines)


def test_pairs_without_a_verdict_keep_the_journal(tmp_path: Path) -> None:
    out = tmp_path / "certificate.json"

    def silent(fields: dict[str, str]) -> Reply:
        return Reply("hm") if fields["candidate"] == "WHO" else by_rule(fields)

    with running(FakeJudge(silent)) as server:
        options = ("--url", server.url, "--model", MODEL, "--out", out, "--repeats", 1)
        assert invoke(*options).exit_code == 0
        assert json.loads(out.read_text())["categories"]["abbreviation"]["equivalent"][
            "no_verdict"
        ] == 1  # fmt: skip
        assert (tmp_path / "certificate.json.journal").is_file()
        server.asked.clear()
        server.answer = by_rule
        assert invoke(*options).exit_code == 0
    assert server.candidates == ["The city of Paris.", "WHO"]  # the question of the check first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["certificate.json"]
    assert read_certificate(out).no_verdict.wrong == 0


def test_what_cannot_be_used(tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    (tmp_path / "c.json.journal").write_text("hello\n")
    with running(FakeJudge(by_rule)) as server:
        for argv, kind, message in (
            (("--url", "localhost:8000"), ConfigError, "not of the form http://host"),
            (("--url", server.url, "--model", "gpt"), RewardError, "there is no model 'gpt'"),
            (("--url", server.url, "--key-env", "NO_SUCH_KEY"), ConfigError, "which is not set"),
            (("--url", server.url, "--model", MODEL, "--out", tmp_path), ConfigError, "a folder"),
            (("--url", server.url, "--model", MODEL, "--out", out), DataError, "line 1 cannot be"),
        ):
            result = invoke(*argv)
            assert isinstance(result.exception, kind), result.output
            assert message in str(result.exception)
    assert not out.exists()


def test_a_run_without_a_judge_or_without_a_demand_is_not_held_up() -> None:
    check_judge_of(Config.model_validate({"model": {"path": "m"}}))
    with running(FakeJudge(by_rule)) as server:
        check_judge_of(config(server.url, api_key_env=None))
