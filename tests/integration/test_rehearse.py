"""tools/rehearse.py, with rows of a twentieth of their length."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tools.rehearse import LONGEST, SHARE_SHORT, SHORT, _first_tokens, lengths

ROOT = Path(__file__).resolve().parents[2]


def test_lengths_are_those_of_docqa_rl() -> None:
    """Its 1,591 rows have 11.4K tokens in the mean, 59.6K at most, and 79 % have up to 20K."""
    sizes = lengths(1600, np.random.default_rng(0))
    assert sizes.max() == LONGEST
    assert abs(sizes.mean() - 11_400) < 600
    assert abs((sizes <= SHORT).mean() - SHARE_SHORT) < 0.03


def test_documents_have_their_tokens_where_tokens_are_long() -> None:
    """A tokenizer of words; those at the beginning are ten times as long as the guess expects."""

    def words(text: str, **_: Any) -> dict[str, Any]:
        return {"offset_mapping": [m.span() for m in re.finditer(r"\S+", text)]}

    text = "longerlongerlongerlonger " * 40 + "a " * 1000
    assert _first_tokens(words, text, 30, guess=60.0) == text[: 25 * 30]
    assert _first_tokens(words, text, 1, guess=2.0) == text[:25]


def test_rehearsal_counts_its_parts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [
            sys.executable, "tools/rehearse.py", str(out), "--tokenizer=examples/quickstart/base",
            "--rows=12", "--prompts=2", "--response-tokens=16", f"--json={tmp_path / 'json'}",
            "phases=[{name: a, max_input_tokens: 5000, steps: 2}]",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "json").read_text())
    assert result["rows"]["longest"] == LONGEST
    assert [step["step"] > 0 for step in result["steps"]] == [True, True]
    parts = result["parts"]
    assert parts["recorder.record"]["calls"] == 2
    assert {"read and tokenise", "curriculum", "recorder.save", "report"} <= set(parts)
    assert all(part["seconds"] > 0 for part in parts.values())
    lines = (out / "run" / "metrics.jsonl").stat().st_size
    assert result["bytes_on_disk"]["metrics.jsonl"] == lines
