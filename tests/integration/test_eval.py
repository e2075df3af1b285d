"""`qlrl eval` by the real command line: killed with kill -9, and started again."""

import json
from collections import Counter
from pathlib import Path
from typing import Any


def test_a_killed_evaluation_goes_on_with_its_answers(
    qlrl: Any, start_qlrl: Any, kill_when: Any, write_config: Any, tmp_path: Path, read_jsonl: Any
) -> None:
    evaluation = {"samples": 4, "temperature": 1.0, "max_input_tokens": 200}
    config = write_config(tmp_path, evaluation=evaluation)
    journal = tmp_path / "run" / "eval" / "eval.journal" / "0.jsonl"
    kill_when(start_qlrl("eval", config), lambda: journal.is_file() and journal.stat().st_size > 0)
    before = journal.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 0 < before.count(b"\n") < 64
    assert not (tmp_path / "run" / "eval" / "eval.json").exists()

    done = qlrl("eval", config).check()
    assert "8 of 16 evaluation prompts lose their middle (eval_long: 8)" in done.out
    assert journal.read_bytes().startswith(before)
    asked = Counter((record["uid"], record["sample"]) for record in read_jsonl(journal))
    assert asked == Counter(
        (f"eval_{name}:{row}", sample)
        for name in ("short", "long")
        for row in range(8)
        for sample in range(4)
    )
    texts = {(r["uid"], r["sample"]): r["response"] for r in read_jsonl(journal)}
    answers = read_jsonl(tmp_path / "run" / "eval" / "eval.jsonl")
    assert {(r["uid"], r["sample"]): r["response"] for r in answers} == texts
    table = done.out.splitlines()
    assert any(line.startswith("eval_short ") and "pass@4" in line for line in table)
    scores = json.loads((tmp_path / "run" / "eval" / "eval.json").read_text())
    assert json.loads(table[-1]) == scores
    assert scores["val/eval_long/cut"] == 8
