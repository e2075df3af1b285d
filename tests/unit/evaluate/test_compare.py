import json
import os

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_qlrl.cli import app
from megatron_qlrl.errors import DataError
from megatron_qlrl.evaluate.compare import compare, comparison_lines, paired_bootstrap, read_run
from megatron_qlrl.evaluate.paper import COLUMNS, MEANS, TABLE_4, paper_lines


def write_run(folder, verdicts, name="eval", **changed):
    """`verdicts`: by uid, the scores of its samples."""
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    records = [
        {"uid": uid, "sample": i, "question": f"q {uid}", "ground_truth": "g", "score": score}
        for uid, scores in verdicts.items()
        for i, score in enumerate(scores)
    ]
    means = {}
    for uid, scores in verdicts.items():
        known = [s for s in scores if s is not None]
        if known:
            means.setdefault(uid.rpartition(":")[0], []).append(np.mean(known))
    metrics = {f"val/{b}/score": float(np.mean(values)) for b, values in means.items()} | changed
    (folder / "eval" / f"{name}.json").write_text(json.dumps(metrics))
    lines = "\n".join(json.dumps(record) for record in records)
    (folder / "eval" / f"{name}.jsonl").write_text(lines + "\n")
    return folder


def test_means_of_the_paper_follow_from_its_columns():
    assert set(TABLE_4) <= set(MEANS)
    for model, cells in TABLE_4.items():
        assert len(cells) == len(COLUMNS) == 7
        assert abs(sum(cells) / 7 - MEANS[model]) <= 0.05, model  # the same, rounded to 0.1


def test_the_table_says_whose_it_is():
    lines = paper_lines()
    assert lines[0].startswith("From the paper, not measured here (QwenLong-L1, arXiv 2505.17667")
    assert (
        lines[-1].split() == "QwenLong-L1-32B-DAPO 67.5 70.1 90.5 83.0 69.0 56.0 58.5 70.7".split()
    )


def test_bootstrap_of_two_questions_by_hand():
    # Means of two draws from {0, 1}: 0 with 1/4, 1/2 with 1/2, 1 with 1/4.
    result = paired_bootstrap([np.array([0.0, 1.0])], num_resamples=40_000, seed=1)
    assert (result.difference, result.low, result.high, result.items) == (0.5, 0.0, 1.0, 2)
    assert result.p == pytest.approx(2 * 0.25, abs=0.02)
    assert not result.told_apart


def test_bootstrap_of_equal_differences():
    result = paired_bootstrap([np.full(5, 0.25)], num_resamples=999)
    assert (result.difference, result.low, result.high, result.told_apart) == (0.25,) * 3 + (True,)
    assert result.p == 2 / 1000
    same = paired_bootstrap([np.zeros(5)])
    assert (same.low, same.high, same.p, same.told_apart) == (0, 0, 1, False)


def test_benchmarks_count_alike_whatever_their_size():
    result = paired_bootstrap([np.full(1000, 0.1), np.full(2, 0.3)])
    assert result.difference == pytest.approx(0.2)
    assert result.low == pytest.approx(0.2)
    assert result.items == 1002


def test_the_interval_has_the_spread_of_theory():
    rng = np.random.default_rng(0)
    one, two = rng.normal(0.1, 0.4, 824), rng.normal(0.1, 0.6, 200)
    result = paired_bootstrap([one, two], seed=3)
    error = (one.var() / 824 + two.var() / 200) ** 0.5 / 2
    assert (result.high - result.low) / 2 == pytest.approx(1.96 * error, rel=0.04)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(7)
    rounds, hits, wrong = 1000, 0, 0
    for seed in range(rounds):
        base, tuned = rng.random(200) < 0.6, rng.random(200) < 0.65  # 0 or 1 on each question
        result = paired_bootstrap([tuned * 1.0 - base], num_resamples=1000, seed=seed)
        hits += result.low <= 0.05 <= result.high
        null = paired_bootstrap(
            [base * 1.0 - (rng.random(200) < 0.6)], num_resamples=500, seed=seed
        )
        wrong += null.told_apart
    assert 0.93 <= hits / rounds <= 0.97
    assert 0.03 <= wrong / rounds <= 0.07


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).normal(size=50)
    assert paired_bootstrap([values], seed=4) == paired_bootstrap([values], seed=4)
    assert paired_bootstrap([values], seed=4) != paired_bootstrap([values], seed=5)


def test_a_run_is_read_by_question(tmp_path):
    run = read_run(
        write_run(tmp_path / "a", {"x:0": [1, 0], "x:1": [None, 1], "x:2": [None], "y:0": [0.5]})
    )
    assert run.scores == {"x": {"x:0": 0.5, "x:1": 1.0}, "y": {"y:0": 0.5}}
    assert run.label == f"{tmp_path / 'a'} (eval)"
    assert run.mean("x") == 0.75
    assert run.standard_error("x") == pytest.approx(0.25)  # deviations of 0.25, n - 1 = 1, n = 2
    assert np.isnan(run.standard_error("y"))


def test_the_newest_evaluation_is_read_unless_a_file_is_named(tmp_path):
    write_run(tmp_path, {"x:0": [0]}, "start")
    write_run(tmp_path, {"x:0": [1]}, "phase_1")
    os.utime(tmp_path / "eval" / "start.jsonl", (1, 1))
    assert read_run(tmp_path).mean("x") == 1
    assert read_run(tmp_path / "eval" / "start.json").mean("x") == 0
    assert read_run(tmp_path / "eval" / "start.jsonl").mean("x") == 0


def test_questions_are_paired_and_others_left_out(tmp_path):
    first = read_run(write_run(tmp_path / "a", {"x:0": [0], "x:1": [1], "x:2": [1], "z:0": [1]}))
    second = read_run(write_run(tmp_path / "b", {"x:1": [0], "x:0": [1], "x:3": [0], "y:0": [1]}))
    result = compare(first, second)
    assert set(result) == {"x", "mean"}
    assert (result["x"].difference, result["x"].items) == (0.0, 2)


def test_runs_that_cannot_be_paired_are_refused(tmp_path):
    first = read_run(write_run(tmp_path / "a", {"x:0": [0]}))
    with pytest.raises(DataError, match="share no question with a verdict"):
        compare(first, read_run(write_run(tmp_path / "b", {"y:0": [0]})))
    folder = write_run(tmp_path / "c", {"x:0": [0]})
    file = folder / "eval" / "eval.jsonl"
    file.write_text(file.read_text().replace("q x:0", "another"))
    with pytest.raises(DataError, match="asked different questions under x:0"):
        compare(first, read_run(folder))


def test_damaged_runs_are_named(tmp_path):
    with pytest.raises(DataError, match=r"has no eval/\*.jsonl"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "a", {"x:0": [0], "x:1": [1]}, **{"val/x/score": 0.9})
    with pytest.raises(DataError, match=r"val/x/score is 0.9, the answers beside it give 0.5"):
        read_run(folder)
    (folder / "eval" / "eval.json").write_text("{}")
    with pytest.raises(DataError, match=r"eval.json: no scores of the answers"):
        read_run(folder)
    (folder / "eval" / "eval.json").unlink()
    with pytest.raises(DataError, match=r"eval.json cannot be read"):
        read_run(folder)
    (folder / "eval" / "eval.jsonl").write_text('{"uid": "x:0"}\n')
    with pytest.raises(DataError, match=r"eval.jsonl, line 1: no answer of an evaluation"):
        read_run(folder)


def test_the_table_shows_several_samples_and_what_is_masked(tmp_path):
    one = read_run(
        write_run(
            tmp_path / "a",
            {"x:0": [1, 0, None], "x:1": [0, 0, 0]},
            **{"val/x/pass@2": 0.5, "val/x/maj@3": 0.25},
        )
    )
    two = read_run(write_run(tmp_path / "b", {"x:0": [1], "x:1": [0]}))
    assert one.several == {"x": {"pass@2": 0.5, "maj@3": 0.25}}
    lines = [line.split() for line in comparison_lines([one, two], [{}])[2:6]]
    assert lines == [
        "x 25.0 ± 25.0 50.0 ± 50.0".split(),
        "pass@2 50.0 -".split(),
        "maj@3 25.0 -".split(),
        "masked 1 masked 0".split(),
    ]


def test_command_says_what_cannot_be_told_apart(tmp_path):
    base = write_run(tmp_path / "base", {f"x:{i}": [i % 2] for i in range(40)} | {"y:0": [0]})
    same = {f"x:{i}": [int(i % 2 or i in (0, 2))] for i in range(40)}
    near = write_run(tmp_path / "near", same | {"y:0": [0]})
    far = write_run(tmp_path / "far", {f"x:{i}": [1] for i in range(40)} | {"y:0": [1]})
    done = CliRunner().invoke(app, ["compare", str(base), str(near), str(far)])
    assert done.exit_code == 0, done.output
    near_part, far_part = done.output.split("95 % interval")[1:]
    near_x = next(line for line in near_part.splitlines() if line.startswith("x "))
    assert "+5.0" in near_x and near_x.endswith("(40 questions)  cannot be told apart")
    far_x = next(line for line in far_part.splitlines() if line.startswith("x "))
    assert "+50.0" in far_x and "apart" not in far_x
    assert done.output.index("Measured:") < done.output.index("From the paper, not measured here")

    shown = CliRunner().invoke(app, ["compare", str(base), str(far), "--json"])
    result = json.loads(shown.output)
    assert result["differences"][0]["by_benchmark"]["x"]["difference"] == 0.5
    assert result["measured"][1]["scores"] == {"x": 1.0, "y": 1.0}
    alone = CliRunner().invoke(app, ["compare", str(base)])
    assert "name two runs or more" in str(alone.exception)
