import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_qlrl.config.load import load_config
from megatron_qlrl.data.builders.docs import build_docs
from megatron_qlrl.reward.rules import check_gold
from megatron_qlrl.reward.score import score_response

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples" / "smollm2-135m"
RUN = (FOLDER / "run.sh").read_text(encoding="utf-8")


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    import data  # pyright: ignore[reportMissingImports]

    yield data
    sys.modules.pop("data")


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A Packages file of 900 packages, two of each source, and some that cannot be used."""
    stanzas = [stanza(f"pkg{i}", source=f"src{i // 2}", version=f"1.{i}-1") for i in range(900)]
    stanzas.append(stanza("pkg0", source="other", version="9"))  # the name is there already
    stanzas.append(stanza("homeless", source="homeless", version="1").replace("Homepage", "Home"))
    path = tmp_path / "packages"
    path.write_text("\n".join(stanzas), encoding="utf-8")
    return path


def stanza(name: str, *, source: str, version: str) -> str:
    return (
        f"Package: {name}\nSource: {source} (1.0-1)\nVersion: {version}\n"
        f"Maintainer: Ada King <ada@{source}.example>\nInstalled-Size: {len(name)}\n"
        f"Description: What {name} is: a test\n  and more of it\nSection: misc\n"
        f"Homepage: https://example.org/{name}\n"
    )


def test_stanzas_have_the_shown_fields_without_addresses(data: Any, packages: Path) -> None:
    stanzas = data.read_stanzas(packages)
    assert len(stanzas) == 900
    assert stanzas[1] == {
        "Package": "pkg1",
        "Version": "1.1-1",
        "Section": "misc",
        "Installed-Size": "4",
        "Maintainer": "Ada King",
        "Homepage": "https://example.org/pkg1",
        "Description": "What pkg1 is: a test",
        "Source": "src0",
    }


def test_training_and_held_out_packages_share_no_source(data: Any, packages: Path) -> None:
    train, held_out = data.split(data.read_stanzas(packages))
    assert len(train) + len(held_out) == 900 and min(len(train), len(held_out)) > 40
    assert not {s["Source"] for s in train} & {s["Source"] for s in held_out}


def test_files_are_the_same_each_time_and_hold_the_gold(
    data: Any, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        argv = ["data.py", str(packages), str(out), "--sft", "20", "--train", "30", "--eval", "15"]
        monkeypatch.setattr(sys, "argv", argv)
        data.main()
    names = sorted(path.relative_to(outs[0]) for path in outs[0].rglob("*.*"))
    assert all((outs[0] / n).read_bytes() == (outs[1] / n).read_bytes() for n in names)

    shown: dict[str, set[str]] = {"train": set(), "eval": set(), "sft": set()}
    for path in outs[0].glob("*.jsonl"):
        part, _, size = path.stem.partition("_")
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        num_eval = 3 if size == "longer" else 15
        assert len(records) == {"sft": 20, "train": 30, "eval": num_eval}[part]
        assert ("response" in records[0]) == (part == "sft")
        low, high = data.SIZES[size or "short"]
        assert len({record["question"] for record in records}) == len(records)
        for record in records:
            if part == "sft":
                score = score_response(
                    data_source=record["data_source"],
                    ground_truth=record["answer"],
                    response_text=record["response"],
                    reasoning_open=False,
                )
                assert score.value == 1.0
            assert low <= len(record["document"]) <= high
            assert len(set(record["document"])) == len(record["document"])
            asked = re.search(r"package (pkg\d+)", record["question"])
            assert asked
            gold = (outs[0] / "documents" / f"{asked[1]}.txt").read_text(encoding="utf-8")
            field = record["data_source"].removeprefix("docs_musique_").title()
            assert f"{field}: {record['answer']}\n" in gold
            assert f"{asked[1]}.txt" in record["document"]
            shown[part] |= set(record["document"])
        kwargs = {"documents_dir": outs[0] / "documents", "check_gold": check_gold}
        assert build_docs(
            questions=path, out=path.with_suffix(".parquet"), split=part, **kwargs
        ) == len(records)
    assert not (shown["train"] | shown["sft"]) & shown["eval"]


def test_numeric_questions_have_one_number_and_name_their_report(data: Any, tmp_path: Path) -> None:
    asked = [
        ("What was the change?", -12.6, "arithmetic", "million"),
        ("How did it grow?", 3.5, "arithmetic", "percent"),
        ("What were sales?", ["$1,496.5"], "span", ""),
        ("Which types are there?", ["fixed", "other"], "multi-span", ""),
        ("What is paid?", ["our costs"], "span", ""),
        ("Which were the years?", ["2018", "2019"], "span", ""),
    ]
    questions = [
        dict(zip(("question", "answer", "answer_type", "scale"), q, strict=True)) for q in asked
    ]
    reports = [
        {
            "table": {"uid": f"report-{i}-uid", "table": [["", "2019"], ["Sales", "$1,496.5"]]},
            "paragraphs": [{"order": 2, "text": "Second."}, {"order": 1, "text": "First."}],
            "questions": questions,
        }
        for i in range(4)
    ]
    path = tmp_path / "tatqa.json"
    path.write_text(json.dumps(reports), encoding="utf-8")
    read = data.read_reports(path)
    assert read[0]["text"] == "Report report-0\nFirst.\nSecond.\n | 2019\nSales | $1,496.5"
    records = data.draw_numeric(read, rounds=2, seed="0")
    assert records == data.draw_numeric(read, rounds=2, seed="0") and len(records) == 2 * 4 * 3
    assert {(r["answer"], r["data_source"]) for r in records} == {
        ("-12.6", "docs_docmath_arithmetic"),
        ("3.5%", "docs_docmath_arithmetic"),
        ("$1,496.5", "docs_docmath_span"),
    }
    for record in records:
        report = re.search(r"report (report-\d)\.", record["question"])
        assert report and f"{report[1]}.txt" in record["document"]
        assert len(set(record["document"])) == len(record["document"]) <= 3


@pytest.mark.parametrize(
    ("count", "held_out"),
    [
        (1, 1),
        (12, 4),  # three questions each
        (13, 5),
        (1000, 10),  # five sixths of 12
    ],
)
def test_reports_are_held_out_until_there_are_enough_questions(
    data: Any, count: int, held_out: int
) -> None:
    reports = [{"Source": f"report-{i}", "questions": ["a", "b", "c"]} for i in range(12)]
    parts = data.split_reports(reports, count)
    assert [len(part) for part in parts] == [12 - held_out, held_out]
    assert sorted(r["Source"] for part in parts for r in part) == sorted(
        r["Source"] for r in reports
    )


def test_the_config_and_the_phases_of_quick_are_loadable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    quick = re.search(r'shape=\("(phases=.*?)"\)', RUN, re.DOTALL)
    assert quick
    for settings in ([], [quick[1]]):
        config = load_config(FOLDER / "config.yaml", settings)
        phases = config.phase_configs()
        for before, phase in zip(config.phases, config.phases[1:], strict=False):
            assert before.max_input_tokens < phase.max_input_tokens
        for phase, own in zip(config.phases, phases, strict=True):
            longest = phase.max_input_tokens + own.rollout.max_response_tokens
            assert longest <= own.policy.max_tokens_per_row


def test_what_is_downloaded_is_pinned_by_its_hash() -> None:
    lines = (FOLDER / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) == 3
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}", p) for p in pins)


STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in *model.py*) mkdir -p "${@: -1}"; touch "${@: -1}/model.safetensors";; esac
case "$*" in *data.py*) mkdir -p "$3"; touch "$3/sft.jsonl" "$3/eval_short.jsonl";; esac
"""


def calls_of_run(folder: Path, *argv: str, **env: str) -> list[str]:
    """Runs the script in a copy of the tree whose programs only note how they are called."""
    example = folder / "examples" / "smollm2-135m"
    stubs = [folder / ".venv" / "bin" / name for name in ("python", "pip", "qlrl")]
    for path in (example / "run.sh", *stubs, folder / "tools" / "setup_env.sh"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RUN if path.name == "run.sh" else STUB, encoding="utf-8")
        path.chmod(0o755)
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    env = {"PATH": os.environ["PATH"], "CALLS": str(calls)} | env
    subprocess.run(["bash", str(example / "run.sh"), *argv], env=env, check=True)
    return calls.read_text(encoding="utf-8").replace(f"{folder}/", "").splitlines()


def test_run_makes_everything_once_and_passes_its_arguments_on(tmp_path: Path) -> None:
    (tmp_path / "own").touch()
    env = {"DOCS": str(tmp_path / "own"), "TATQA": str(tmp_path / "own"), "OUT": "o"}
    calls = calls_of_run(tmp_path, "run.seed=3", **env)
    assert [" ".join(call.split()[:2]) for call in calls] == [
        "setup_env.sh",
        "pip install",
        "python examples/smollm2-135m/model.py",
        "python examples/smollm2-135m/data.py",
        "qlrl data",
        "qlrl data",
        "qlrl sft",
        "qlrl rl",
        "python examples/smollm2-135m/../quickstart/summary.py",
    ]
    assert calls[3].endswith("data.py own o/data --eval 256 --tatqa own")
    for call in calls[6:8]:
        assert call.endswith(" run.seed=3") and "phases=" not in call
        files = (f"o/data/eval_{size}.parquet" for size in ("short", "long", "longer", "numeric"))
        assert f"data.eval_files=[{','.join(files)}]" in call
    again = calls_of_run(tmp_path, "run.seed=3", **env)
    assert again[:3] == [calls[0], *calls[6:8]] and len(again) == 4


def test_quick_has_its_own_folder_phases_and_files(tmp_path: Path) -> None:
    (tmp_path / "own").touch()
    calls = "\n".join(calls_of_run(tmp_path, "--quick", DOCS=str(tmp_path / "own")))
    assert "own runs/smollm2-135m-quick/data --eval 48\n" in calls
    assert calls.count("phases=[{name: short") == 2
    assert "train_long.parquet]" in calls and "longer" not in calls
