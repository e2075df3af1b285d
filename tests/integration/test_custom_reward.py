"""An own reward in whole runs: it crashes, hangs and lies, then it is mended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.make_reference import undocumented

BAD = """
from pathlib import Path

CALLS = Path(__file__).with_name("calls")

def reward(response):
    with CALLS.open("ab") as calls:
        calls.write(b".")
    if CALLS.stat().st_size <= 8:
        return len(response) % 10 / 10
    kind = len(response) % 4
    if kind == 0:
        while True:
            pass
    if kind == 1:
        raise ValueError("crash")
    return 2.0 if kind == 2 else float("nan")
"""
GOOD = """
def reward(response):
    return len(set(response)) / 100
"""


def test_a_reward_that_fails_stops_the_run_and_is_mended(
    qlrl: Callable[..., Any],
    write_config: Callable[..., Path],
    answering_model: Path,
    read_jsonl: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    module = tmp_path / "mine.py"
    config = write_config(
        tmp_path,
        model={"path": str(answering_model)},
        phases=[{"name": "phase1", "max_input_tokens": 1000, "steps": 2}],
        reward={
            "custom": {"toy": "mine:reward"},
            "custom_timeout_s": 2,
            "max_masked_share": 1.0,
        },
        evaluation={"at_phase_end": True, "every_steps": None},
        rollout={"prompts_per_step": 2, "group_size": 4},
    )

    module.write_text(BAD)  # from the second step on
    stopped = qlrl("rl", config, "reward.max_masked_share=0.1")
    assert stopped.code == 2
    (message,) = stopped.messages
    assert "own rewards gave no verdict on 8 of 8 responses, more than" in message
    assert "reward.custom: mine:reward " in message and "the run resumes" in message

    module.write_text(GOOD)
    done = qlrl("rl", config, "reward.max_masked_share=0.1").check()
    assert "the source of toy (mine:reward): " in done.out
    steps = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "actor/lr" in r]
    assert [s["reward/custom/asked"] for s in steps] == [8, 8]
    assert all(0 < s["critic/rewards/min"] <= s["critic/rewards/max"] < 1 for s in steps)

    # With no limit a run goes on without rewards, and says so at every step. `calls` is full.
    module.write_text(BAD)
    told = qlrl("rl", config, f"run.dir={tmp_path / 'told'}").check()
    assert told.out.count("own rewards failed on 8 of 8 responses, which have no verdict") == 2
    record = read_jsonl(tmp_path / "told" / "metrics.jsonl")
    first = next(r for r in record if "reward/custom/asked" in r)
    names = ("raised", "invalid", "timeout", "crashed")
    assert sum(first[f"reward/custom/{name}"] for name in names) == 8
    assert first["critic/rewards/masked"] == 8
    assert undocumented({name for line in record for name in line} - {"step"}) == []
