"""Means by step and agreement, by hand; the command on a rollout log."""

import json

import pytest
from judge_server import MODEL, FakeJudge, Reply, running
from typer.testing import CliRunner

from megatron_qlrl.behaviours.count import Agreement, agreement, count_behaviours, response_files
from megatron_qlrl.behaviours.judge import Counts
from megatron_qlrl.cli import app
from megatron_qlrl.errors import DataError

GROUNDED = "According to the text, it is blue. The text says so."
PLAIN = "It is blue."


def record(response, sample=0, uid="a:0"):
    return {"uid": uid, "sample": sample, "question": "What colour?", "response": response}


def log(folder, **steps):
    (folder / "rollouts").mkdir(parents=True)
    for name, records in steps.items():
        text = "".join(json.dumps(each) + "\n" for each in records)
        (folder / "rollouts" / f"{name}.jsonl").write_text(text)
    return folder


def judged(grounding):
    return Counts(grounding=grounding, subgoal_setting=0, backtracking=0, verification=0)


def test_agreement_by_hand():
    # No ties: ranks 1 2 3 4 and 1 3 2 4, so rho = 1 - 6 * (1 + 1) / (4 * 15) = 0.8.
    result = agreement([0, 1, 2, 3], [0, 2, 1, 3])
    assert result.exact == 0.5
    assert result.spearman == pytest.approx(0.8)
    # Ties: ranks 1.5 1.5 3 and 1 2.5 2.5 have the covariance 0.75 of the centred ranks
    # (-.5 -.5 1) and (-1 .5 .5), each of squared length 1.5: 0.75 / 1.5 = 0.5.
    assert agreement([0, 0, 4], [1, 7, 7]) == Agreement(3, 0.0, pytest.approx(0.5))
    assert agreement([1, 1], [1, 2]) == Agreement(2, 0.5, None)
    assert agreement([], []) == Agreement(0, None, None)


def test_means_by_step_leave_out_what_has_no_verdict(tmp_path):
    run = log(
        tmp_path,
        step_000000=[record(PLAIN), record(GROUNDED, 1), record(PLAIN, 2)],
        step_000007=[record(GROUNDED)],
    )
    answers = {"0": [judged(1), None, judged(4)], "7": [None]}
    written = []
    result = count_behaviours(
        response_files(run),
        ask=lambda asked: answers["0" if len(asked) == 3 else "7"],
        per_step=None,
        write=written.append,
    )
    first, last = result.steps
    assert (first.step, first.responses, first.no_verdict) == (0, 3, 1)
    assert first.lexical["grounding"] == pytest.approx(2 / 3)
    assert first.judge is not None
    assert first.judge["grounding"] == 2.5
    assert (last.step, last.judge, last.no_verdict) == (7, None, 1)
    assert last.lexical["grounding"] == 2.0
    # Patterns 0 and 0, judge 1 and 4: never the same, and without a rank.
    assert result.agreement["grounding"] == Agreement(2, 0.0, None)
    assert result.agreement["verification"] == Agreement(2, 1.0, None)
    assert [r["judge"] and r["judge"]["grounding"] for r in written] == [1, None, 4, None]
    assert written[1]["lexical"]["grounding"] == 2
    assert (written[3]["step"], written[1]["sample"]) == (7, 1)


def test_some_responses_of_a_step_are_spread_over_it(tmp_path):
    run = log(tmp_path, step_000001=[record(PLAIN, sample) for sample in range(10)])
    written = []
    result = count_behaviours(response_files(run), ask=None, per_step=4, write=written.append)
    assert [r["sample"] for r in written] == [0, 2, 5, 7]
    assert result.steps[0].responses == 4
    assert result.steps[0].no_verdict is None
    assert result.agreement == {}


def test_damaged_lines_are_noted_and_lines_without_a_response_left_out(tmp_path):
    run = log(tmp_path, step_000001=[record(PLAIN), {"uid": "x"}, {"response": 5}])
    with (run / "rollouts" / "step_000001.jsonl").open("a") as stream:
        stream.write("half a li\n")
    result = count_behaviours(response_files(run), ask=None, per_step=None, write=lambda _: None)
    assert result.steps[0].responses == 1
    assert result.notes == ["step_000001.jsonl: 1 line(s) are damaged and left out"]


def test_nothing_to_count_is_said(tmp_path):
    with pytest.raises(DataError, match="has no rollout log"):
        response_files(tmp_path)
    run = log(tmp_path, step_000001=[{"uid": "x"}])
    with pytest.raises(DataError, match="no line has a field `response`"):
        count_behaviours(response_files(run), ask=None, per_step=None, write=lambda _: None)


def test_command_without_a_judge(tmp_path):
    run = log(tmp_path, step_000003=[record(GROUNDED), record(PLAIN)])
    done = CliRunner().invoke(app, ["behaviours", str(run)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[1].split() == [
        "3", "2", "patterns", "1.00", "0.00", "0.00", "0.00",
    ]  # fmt: skip
    assert "judge" not in done.output
    assert json.loads((run / "behaviours.json").read_text())["steps"][0]["step"] == 3


def test_command_with_a_judge_that_is_half_there(tmp_path):
    run = log(tmp_path, step_000003=[record(GROUNDED), record(PLAIN)])

    def answer(fields):
        if fields["response"] == PLAIN:
            return Reply("It shows none.")
        counts = {"grounding": 2, "subgoal_setting": 0, "backtracking": 0, "verification": 1}
        return Reply(json.dumps(counts))

    with running(FakeJudge(answer)) as server:
        command = ["behaviours", str(run), "--judge-url", server.url, "--judge-model", MODEL]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert "1 without a verdict" in done.output
        assert "1 responses have no verdict" in done.output
        assert "not the four counts" in done.output
        requests = len(server.requests)
        shown = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
        assert len(server.requests) == requests + 1  # the one without a verdict
    assert shown["steps"][0]["judge"] == {
        "grounding": 2.0, "subgoal_setting": 0.0, "backtracking": 0.0, "verification": 1.0,
    }  # fmt: skip
    assert shown["steps"][0]["no_verdict"] == 1
    assert shown["agreement"]["grounding"] == {"responses": 1, "exact": 1.0, "spearman": None}
    lines = (run / "behaviours.jsonl").read_text().splitlines()
    assert [json.loads(line)["judge"] is None for line in lines] == [False, True]


def test_command_on_a_file_of_answers(tmp_path):
    file = tmp_path / "eval.jsonl"
    file.write_text(json.dumps(record(GROUNDED)) + "\n")
    done = CliRunner().invoke(app, ["behaviours", str(file), "--json"])
    assert json.loads(done.stdout)["steps"][0]["lexical"]["grounding"] == 2.0
    assert (tmp_path / "eval.jsonl.behaviours.json").exists()
    done = CliRunner().invoke(app, ["behaviours", str(tmp_path / "none")])
    assert "does not exist" in str(done.exception)
