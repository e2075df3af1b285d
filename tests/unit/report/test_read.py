"""Missing and damaged files cost their part of the page; a folder that is no run is refused."""

import json
import random
import re
from pathlib import Path

import pytest
import yaml

from megatron_qlrl.errors import DataError
from megatron_qlrl.report.page import report_page
from megatron_qlrl.report.read import flat, read_runs
from tests.run_folder import write_certificate, write_evaluation, write_run


def test_no_run_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no run folder: it has none of") as caught:
        read_runs([write_run(tmp_path / "a"), tmp_path])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "starts.jsonl"])
@pytest.mark.parametrize("damage", [None, b"", b"\xff\x00 {", b"[1, 2]\n", b'{"step": 1e999}\n'])
def test_page_shows_what_there_is(tmp_path: Path, name: str, damage: bytes | None) -> None:
    folder = write_run(tmp_path / "a")
    (folder / name).unlink()
    if damage is not None:
        (folder / name).write_bytes(damage)
    assert report_page(read_runs([folder]))


def test_damaged_folders_never_break_the_page(tmp_path: Path, fuzz_cases: int) -> None:
    """Bytes of a random file are overwritten, left out or doubled, or a value becomes another."""
    rng = random.Random(0)
    values = [b'"x"', b"null", b"-1", b"1e999", b"[]", b"{}", b"true", b"NaN"]
    folder = write_run(tmp_path / "a")
    write_evaluation(folder, "long", [0.0, 1.0, 1.0])
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for _ in range(fuzz_cases):
        path = rng.choice(files)
        whole = path.read_bytes()
        at, end = sorted(rng.randrange(len(whole)) for _ in range(2))
        numbers = [m.span() for m in re.finditer(rb"(?<=: )[^,}]+", whole)] or [(at, end)]
        start, stop = rng.choice(numbers)
        damaged = [
            whole[:at] + rng.randbytes(end - at) + whole[end:],
            whole[:at] + whole[end:],
            whole[:end] + whole[at:],
            whole[:start] + rng.choice(values) + whole[stop:],
        ]
        path.write_bytes(rng.choice(damaged))
        assert report_page(read_runs([folder]))
        path.write_bytes(whole)


def test_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "starts.jsonl").write_text("")
    assert report_page(read_runs([tmp_path]))


def test_line_that_is_being_written_is_no_damage(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "critic')
    (run,) = read_runs([folder])
    assert (run.steps_done, run.notes) == (4, [])
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write("\n")
    assert read_runs([folder])[0].notes == ["metrics.jsonl: 1 line(s) are damaged and left out"]


def test_labels_tell_folders_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "rl") for name in ("a", "b")]
    assert [run.label for run in read_runs([*folders, folders[0]])] == ["a/rl", "b/rl"]


def test_flat_names_leaves() -> None:
    tree = {"a": {"b": 1, "c": {}}, "d": [{"e": 2}], "f": [3, 4]}
    assert flat(tree) == {"a.b": 1, "a.c": {}, "d.0.e": 2, "f": [3, 4]}


def test_other_line_ends_within_an_answer(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    path = folder / "rollouts" / "step_000000.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub("the answer is", "the\u2028answer\x85is", text), encoding="utf-8")
    assert b"the\\u2028answer\xc2\x85is" in report_page(read_runs([folder]))


def test_the_judges_certificate_is_read_where_the_config_names_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    copy = write_certificate(folder / "judge_certificate.json")
    assert read_runs([folder])[0].certificate is None  # of an earlier start
    judge = {"urls": ["http://h/v1"], "model": "judge", "max_false_positive": 0.05}
    config = folder / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["reward"] = {"judge": judge | {"certificate": "elsewhere.json"}}
    config.write_text(yaml.safe_dump(settings))
    (run,) = read_runs([folder])
    assert run.certificate is not None and run.certificate.false_positives.wrong == 1
    page = report_page([run]).decode()
    assert "judge: false positives 2.0% (1 of 50 pairs, 95% interval 0.4% to 10.5%), " in page
    assert "; demanded: false positives of at most 5.0%" in page
    copy.write_text("{")
    (run,) = read_runs([folder])
    assert run.certificate is None
    assert [note for note in run.notes if "the judge's certificate is left out: " in note]
    assert "judge: no certificate" in report_page([run]).decode()


def test_behaviours_join_the_steps_that_have_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    step = {"step": 2, "lexical": {"grounding": 1.5}, "judge": {"grounding": 2.0}}
    other = {"step": 3, "lexical": {"grounding": 0.5}, "judge": None}
    (folder / "behaviours.json").write_text(json.dumps({"steps": [step, other]}))
    (run,) = read_runs([folder])
    names = ("behaviours/patterns/grounding", "behaviours/judge/grounding")
    assert [tuple(line.get(name) for name in names) for line in run.steps] == [
        (None, None), (None, None), (1.5, 2.0), (0.5, None),
    ]  # fmt: skip
    assert b"Behaviours by the judge" in report_page([run])


@pytest.mark.parametrize("text", ["", "[]", '{"steps": [1]}', '{"steps": [{"step": null}]}'])
def test_damaged_behaviours_cost_their_chart(tmp_path: Path, text: str) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "behaviours.json").write_text(text)
    (run,) = read_runs([folder])
    assert run.notes == ["behaviours.json is damaged and left out"]
    assert report_page([run])
