"""`qlrl eval` of a model behind a service, which is a server by hand."""

import json
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fake_policy import BASE
from judge_server import FakeJudge, Reply, running
from typer.testing import CliRunner

from megatron_qlrl.cli import app
from megatron_qlrl.errors import DataError

KEY = "sk-very-secret"


def write_config(folder: Path, url: str, *, num: int = 2, samples: int = 2, **service: Any) -> Path:
    rows = [
        {
            "data_source": "musique",
            "prompt": [
                {"role": "user", "content": f"{'word ' * (300 if i == 0 else 3)}number {i}"}
            ],
            "reward_model": {"style": "rule", "ground_truth": f"n{i}"},
        }
        for i in range(num)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "held.parquet")
    config = {
        "model": {"path": str(BASE)},
        "run": {"dir": str(folder / "run"), "seed": 3},
        "data": {"eval_files": [str(folder / "held.parquet")]},
        "rollout": {"max_response_tokens": 24},
        "evaluation": {
            "samples": samples,
            "max_input_tokens": 100,
            "endpoint": {"urls": [url], "model": "other", "cooldown_s": 0.1, **service},
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def right(fields: dict[str, str]) -> Reply:
    return Reply(f"The answer is n{fields['prompt'].rsplit(maxsplit=1)[-1]}")


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_another_model_is_scored_under_the_same_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", KEY)
    with running(FakeJudge(answer=right, key=KEY)) as server:
        config = write_config(tmp_path, server.url, api_key_env="OTHER_KEY")
        done = CliRunner().invoke(app, ["eval", str(config)])
        assert done.exit_code == 0, done.output + repr(done.exception)
        again = CliRunner().invoke(app, ["eval", str(config)])
    assert len(server.requests) == 4  # the second command asked for nothing
    assert again.output == done.output
    assert "1 of 2 evaluation prompts lose their middle (held: 1)" in done.output
    scores = json.loads((tmp_path / "run" / "eval" / "eval.json").read_text())
    assert (scores["val/held/score"], scores["val/held/cut"], scores["val/held/pass@2"]) == (
        1,
        1,
        1,
    )
    long = [r for r in server.requests if r["messages"][0]["content"].endswith("number 0")]
    assert len(long) == 2 and long[0]["messages"][0]["content"].startswith("word word")
    assert len(long[0]["messages"][0]["content"]) < 1000
    assert len({r["seed"] for r in server.requests}) == 4
    assert {
        (r["model"], r["temperature"], r["top_p"], r["max_tokens"]) for r in server.requests
    } == {("other", 0.7, 0.95, 24)}
    assert KEY not in done.output
    assert not any(KEY in f.read_text() for f in (tmp_path / "run").rglob("*") if f.is_file())


def test_missing_answers_are_no_score(tmp_path: Path) -> None:
    def answer(fields: dict[str, str]) -> Reply:
        return Reply(status=400) if fields["prompt"].endswith("1") else right(fields)

    with running(FakeJudge(answer=answer)) as server:
        config = write_config(tmp_path, server.url)
        failed = CliRunner().invoke(app, ["eval", str(config)])
        assert isinstance(failed.exception, DataError)
        assert "2 of 4 answers could not be had (last: " in str(failed.exception)
        assert "HTTP 400" in str(failed.exception)
        assert not (tmp_path / "run" / "eval" / "eval.json").exists()
        server.answer = right
        assert CliRunner().invoke(app, ["eval", str(config)]).exit_code == 0
    assert len(server.requests) == 6  # the two that failed, again


def test_a_server_that_dies_and_comes_back_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """1,000 questions x 4 samples, 64 in flight."""
    judge = FakeJudge(answer=lambda fields: replace(right(fields), wait_s=0.1))
    with running(judge):
        port = int(judge.url.rsplit(":", 1)[1].split("/")[0])
        config = write_config(tmp_path, judge.url, num=1000, samples=4, attempts=10)
        results: list[Any] = []
        work = threading.Thread(
            target=lambda: results.append(CliRunner().invoke(app, ["eval", str(config)]))
        )
        work.start()
        while len(judge.requests) < 1000 and work.is_alive():
            time.sleep(0.01)
    time.sleep(0.5)
    with running(judge, port=port):
        work.join()
    assert results[0].exit_code == 0, repr(results[0].exception)
    lines = records(tmp_path / "run" / "eval" / "endpoint.journal")[1:]
    every = Counter((f"held:{i}", k) for i in range(1000) for k in range(4))
    assert Counter((r["uid"], r["sample"]) for r in lines) == every
    answers = records(tmp_path / "run" / "eval" / "eval.jsonl")
    assert Counter((r["uid"], r["sample"]) for r in answers) == every
    assert all(r["response"] == f"The answer is n{r['uid'][5:]}" for r in lines)
    assert judge.most_in_flight > 32
