"""tools/gpu_day.py: its parts and table, how it ends commands, and one part without a GPU."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.gpu_day import PARTS, Day, Failed, differences, headline, last_json, table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def day(tmp_path: Path) -> Day:
    return Day(
        out=tmp_path, processes=1, gpu=False, tokenizer=tmp_path, hardware="h100-80g", part="toy"
    )


def test_the_page_explains_every_part_in_order() -> None:
    page = (ROOT / "docs" / "first-gpu-day.md").read_text(encoding="utf-8")
    assert re.findall(r"^\d+\. \*\*`(\w+)`\*\*, ", page, re.MULTILINE) == list(PARTS)
    assert all(part.__doc__ for part in PARTS.values())


def test_table_has_a_line_for_each_part_that_ran() -> None:
    results = {
        "toy": {"part_s": 68.7, "says": "6 steps"},
        "machine": {"part_s": 14.7},
        "kill": {"part_s": 3.2, "failed": "qlrl ended with 1\nTypeError: no\n"},
    }
    assert table(results).splitlines()[2:] == [
        "| machine | 15 | ok |",
        "| toy | 69 | 6 steps |",
        "| kill | 3 | FAILED: TypeError: no |",
    ]


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("Traceback:\n  File x\nImportError: no symbol\n\nretrying\n}", "ImportError: no symbol"),
        ("step 0\nqlrl: error: no memory\n  give less", "qlrl: error: no memory"),
        ("ValueError: first\nvllm.v1.EngineDeadError: dead", "vllm.v1.EngineDeadError: dead"),
        ("step 0\nstep 1", "the command was killed"),
    ],
)
def test_a_failed_part_shows_its_last_error(output: str, line: str) -> None:
    failed = f"the command was killed\n{output}"
    assert headline({"failed": failed}) == f"FAILED: {line}"


def test_command_is_killed_at_its_limit_and_when_told(day: Day) -> None:
    command = [sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"]
    with pytest.raises(Failed, match="killed at its limit"):
        day.must(command, limit_s=0.5)
    log = day.out / "logs" / "toy.log"
    done = day.run(command, limit_s=60, until=lambda: log.read_text().count("begun\n") == 2)
    assert (done.code, done.output) == (None, "begun\n")
    with pytest.raises(Failed, match=r"ended with 3 after .*\nbroken"):
        day.must([sys.executable, "-c", "print('broken'); exit(3)"], limit_s=60)


def test_differences_name_the_first_step(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    def run(name: str, weight: float, losses: list[float], response: str) -> Path:
        for folder in ("hf", "rollouts"):
            (tmp_path / name / folder).mkdir(parents=True)
        save_file({"w": torch.tensor([1.0, weight])}, tmp_path / name / "hf" / "model.safetensors")
        lines: list[dict[str, Any]] = [
            {"step": step, "loss": loss, "timing_s/step": hash(name)}
            for step, loss in enumerate(losses)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
        texts = [json.dumps({"response": text}) for text in ("same", response)]
        (tmp_path / name / "rollouts" / "step_1.jsonl").write_text("\n".join(texts))
        return tmp_path / name

    reference = run("reference", 2.0, [0.5, 0.25], "yes")
    assert differences(run("equal", 2.0, [0.5, 0.25], "yes"), reference)["bitwise_equal"]
    result = differences(run("other", 1.5, [0.5, 0.75], "no"), reference)
    assert result["says"] == "differs: loss from step 1"
    assert result["largest_weight_difference"] == 0.5
    assert result["rollouts_that_differ"] == {"step_1.jsonl": {"responses": 2, "equal": 1}}
    first = result["first_metrics_that_differ"]
    assert first == {"loss": {"first_step": 1, "run": 0.75, "reference": 0.25}}
    assert not differences(run("short", 2.0, [0.5], "yes"), reference)["bitwise_equal"]


def test_last_json_of_an_output() -> None:
    assert last_json('{\n "a": 1\n}\nqlrl: note\n{\n "b": {\n  "c": 2\n }\n}\n') == {"b": {"c": 2}}


def test_machine_part_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "tools/gpu_day.py", str(tmp_path), "--parts", "machine"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\| machine \| \d+ \| ", done.stdout, re.MULTILINE)
    result = json.loads((tmp_path / "day.json").read_text())["machine"]
    assert any(line.startswith("megatron-core ") for line in result["check"])
    assert result["packages"]["torch"] != "absent"
    assert "megatron-core " in (tmp_path / "logs" / "machine.log").read_text()
    done = subprocess.run([*command, "none"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no part none; there are machine, sft, toy" in done.stderr
