"""Where a report goes, and what becomes of one that fails at the end of a run."""

from pathlib import Path

import pytest

from megatron_qlrl.errors import ConfigError
from megatron_qlrl.report.write import report_at_end, write_report
from tests.run_folder import change_config, write_run


def test_report_lies_in_the_folder_of_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    target, size = write_report([folder])
    assert target == folder / "report.html"
    assert target.stat().st_size == size


def test_report_of_several_runs_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert write_report(folders)[0].resolve() == tmp_path / "report.html"


def test_report_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        write_report([write_run(tmp_path / "a")], tmp_path / "none" / "report.html")


def test_end_of_a_run_writes_a_report_or_says_why_not(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    assert report_at_end(folder) is None
    assert (folder / "report.html").is_file()
    problem = report_at_end(tmp_path)
    assert problem and "is no run folder" in problem


def test_report_of_a_child_lies_in_its_folder_and_shows_its_parent(tmp_path: Path) -> None:
    parent, child = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    change_config(child, run={"parent": f"{parent}:4"})
    target, _ = write_report([child])
    assert target == child / "report.html"
    page = target.read_text()
    assert page.index(f'"folder":"{parent}"') < page.index(f'"folder":"{child}"')
