"""Sums, tables and curves of the page, against values worked out by hand."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_qlrl.report.content import contents
from megatron_qlrl.report.read import read_runs, read_with_parents
from tests.run_folder import change_config, step_line, write_evaluation, write_jsonl, write_run


def shown(*folders: Path, rate: float | None = None) -> dict[str, Any]:
    return contents(read_runs(folders), rate=rate)


def test_cost_by_stage(tmp_path: Path) -> None:
    cost = shown(write_run(tmp_path / "a"), rate=3.0)["runs"][0]["cost"]
    # 4 steps of 10 s: 6 s of generation, 3 s of updates, 1 s of the rest; an evaluation of 20 s;
    # two processes all the time.
    stages = {name: (seconds, hours) for name, seconds, hours in cost["stages"]}
    assert stages == {
        "gen": (24.0, pytest.approx(48 / 3600)),
        "update_actor": (12.0, pytest.approx(24 / 3600)),
        "rest of the steps": (4.0, pytest.approx(8 / 3600)),
        "testing": (20.0, pytest.approx(40 / 3600)),
    }
    assert cost["seconds"] == 60
    assert cost["hours"] == pytest.approx(120 / 3600)
    assert cost["money"] == pytest.approx(0.1)
    assert (cost["tokens"], cost["processes"], cost["unit"]) == (16_000, 2, "CPU process")


def test_processes_of_each_step_count(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    wide = step_line(1, **{"perf/throughput": 50.0, "perf/max_memory_allocated_gb": 1.0})
    write_jsonl(folder / "metrics.jsonl", [step_line(0), wide])  # 2 processes, then 8
    cost = shown(folder)["runs"][0]["cost"]
    assert cost["hours"] == pytest.approx((2 * 10 + 8 * 10) / 3600)
    assert (cost["unit"], cost["money"]) == ("GPU", None)


def test_status(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=3)
    run = shown(folder)["runs"][0]
    assert (run["status"], run["steps_done"], run["steps_planned"]) == ("stopped", 3, 4)
    (folder / "run.lock.1").touch()
    assert shown(folder)["runs"][0]["status"] == "going on"
    write_run(folder)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").touch()
    assert shown(folder)["runs"][0]["status"] == "finished"


def test_evaluations_and_differences(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    write_evaluation(second, "long", [1.0, 1.0, 1.0, 1.0])
    page = shown(first, second)
    rows = [(r["run"], r["name"], r["cells"]) for r in page["evaluations"]["rows"]]
    # mean 1/2; the standard deviation of 0, 1, 0, 1 is 0.57735, over the root of 4 questions
    half, whole = [0.5, 0.28868], [1.0, 0.0]
    assert rows == [
        ("a", "start", [half, half]),
        ("b", "start", [half, half]),
        ("b", "long", [whole, whole]),
    ]
    assert page["evaluations"]["figures"] == ["masked"]
    assert [row["values"] for row in page["evaluations"]["more"]] == [[0.0]] * 3
    pairs = [(d["second"], d["first"]) for d in page["differences"]]
    assert pairs == [("b: long", "b: start"), ("b: long", "a: start")]
    assert [d["cells"]["set"]["numbers"][0] for d in page["differences"]] == [0.5, 0.5]
    assert page["differences"][0]["cells"]["set"]["items"] == 4


def test_the_papers_table_stands_beside_its_benchmarks(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    assert shown(folder)["published"] is None
    write_evaluation(folder, "eval", [1.0, 0.0], benchmark="frames")
    table = shown(folder)["published"]
    rows = {name: scores for name, *scores in table["rows"]}
    assert rows["QwenLong-L1-32B-GRPO"] == [68.0, 72.2, 87.0, 82.0, 66.0, 61.0, 56.0, 70.3]
    assert rows["QwenLong-L1-14B-GRPO"] == [None] * 7 + [68.2]


def test_evaluation_without_answers_keeps_its_score(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "eval" / "start.jsonl").unlink()
    page = shown(folder)
    assert page["evaluations"]["rows"][0]["cells"] == [[0.5, None], [0.5, None]]
    assert any("evaluation start has no errors" in note for note in page["runs"][0]["notes"])


def test_curves_phases_and_events(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    lines = [step_line(0), step_line(1, **{"stability/kl_spike": 2, "actor/entropy": None})]
    lines.append(step_line(2, **{"stability/skipped": 1, "stability/roll_backs": 1}))
    write_jsonl(folder / "metrics.jsonl", lines)
    run = shown(folder)["runs"][0]
    assert run["curves"]["steps"]["x"] == [0, 1, 2]
    assert run["curves"]["steps"]["y"]["critic/rewards/mean"] == [0.0, 0.1, 0.2]
    assert run["events"] == [[1, "kl_spike", 2], [2, "skipped", 1], [2, "roll_back", 1]]
    starts = [(p["name"], p["start"], p["steps_done"], p["reward"]) for p in run["phases"]]
    assert starts == [("short", 0, 2, [0.0, 0.1]), ("long", 2, 1, [0.2, 0.2])]


def test_long_curves_are_means_of_equal_parts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    write_jsonl(folder / "metrics.jsonl", [step_line(step) for step in range(12_000)])
    run = shown(folder)["runs"][0]
    assert len(run["curves"]["steps"]["x"]) == 6_000
    assert run["curves"]["steps"]["x"][:2] == [0.5, 2.5]
    assert "each point of the curves is the mean of 2.0 steps" in run["notes"]


def test_settings_differ_from_defaults_and_between_runs(tmp_path: Path) -> None:
    page = shown(write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=1e-6))
    rows = {row["name"]: row["values"] for row in page["settings"]}
    assert rows["optimizer.lr"] == ["1e-05", "1e-06"]
    assert rows["phases.1.name"] == ["long", "long"]
    assert "optimizer.weight_decay" not in rows


def test_a_child_stands_behind_its_parent(tmp_path: Path) -> None:
    parent, child, grandchild = (write_run(tmp_path / name) for name in ("a", "b", "c"))
    change_config(child, run={"parent": f"{parent}:3"})
    change_config(grandchild, run={"parent": f"{child}:2"})

    def places(*folders: Path) -> list[tuple[str, int, str | None]]:
        runs = contents(read_with_parents(folders), rate=None)["runs"]
        return [(run["label"], run["first_step"], run["parent"]) for run in runs]

    of_child, of_grandchild = f"{parent}, step 3", f"{child}, step 2"
    assert places(parent) == [("a", 0, None)]
    assert places(child) == [("a", 0, None), ("b", 3, of_child)]
    assert places(child, parent) == [("b", 3, of_child), ("a", 0, None)]
    assert places(grandchild) == [("b", 0, of_child), ("c", 2, of_grandchild)]
    assert places(parent, child, grandchild) == [
        ("a", 0, None),
        ("b", 3, of_child),
        ("c", 5, of_grandchild),
    ]
    shutil.rmtree(parent)
    assert places(child) == [("b", 0, of_child)]


def test_an_evaluation_has_no_parent(tmp_path: Path) -> None:
    """It is scored with the config of a run, which may name one."""
    parent, folder = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    change_config(folder, run={"parent": f"{parent}:3"})
    (folder / "metrics.jsonl").unlink()
    (run,) = read_with_parents([folder])
    assert (run.command, run.parent) == ("eval", None)
