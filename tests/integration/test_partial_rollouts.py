"""Partial rollouts with the real engine: a budget that no response reaches changes nothing; a run
that was killed while responses waited ends with the same bits.

Runs: budget (no response reaches it), whole (8 of at most 24 tokens a step), cut (killed, resumed).
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_qlrl.weights.checkpoint_folder import read_state

SECTIONS: dict[str, Any] = {
    "phases": [
        {"name": "phase1", "max_input_tokens": 250, "steps": 4},
        {"name": "phase2", "max_input_tokens": 1000, "steps": 3},
    ],
    "rollout": {"tokens_per_round": 8},
    "algorithm": {"max_staleness": 2},
    "evaluation": {"at_phase_end": False, "every_steps": None},
    "logging": {"rollouts_per_step": 99},
}


def same_weights(one: Path, other: Path) -> bool:
    here, there = (load_file(run / "hf" / "model.safetensors") for run in (one, other))
    return here.keys() == there.keys() and all(torch.equal(here[k], there[k]) for k in here)


def test_a_budget_that_no_response_reaches_changes_nothing(
    finished_run: Path,
    qlrl: Any,
    write_config: Any,
    read_jsonl: Any,
    untimed: Any,
    tmp_path: Path,
) -> None:
    config = write_config(
        tmp_path, rollout={"tokens_per_round": 24}, algorithm={"max_staleness": 1}
    )
    qlrl("rl", config).check()
    run = tmp_path / "run"
    assert same_weights(finished_run, run)
    for file in (finished_run / "rollouts").iterdir():
        assert file.read_bytes() == (run / "rollouts" / file.name).read_bytes(), file.name
    plain, got = (untimed(read_jsonl(r / "metrics.jsonl")) for r in (finished_run, run))
    assert [
        {k: v for k, v in g.items() if k in p} for p, g in zip(plain, got, strict=True)
    ] == plain
    extra = {k: v for line in got for k, v in line.items() if "unfinished" in k}
    assert extra and not any(extra.values())


@pytest.fixture(scope="module")
def whole(qlrl: Any, write_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    qlrl("rl", write_config(folder, **SECTIONS)).check()
    return folder / "run"


def test_responses_go_on_with_the_weights_of_each_step(whole: Path, read_jsonl: Any) -> None:
    lines = read_jsonl(whole / "metrics.jsonl")
    assert lines[0]["batch/unfinished_responses"] > 0
    # A phase's last step leaves nothing waiting; no token is older than two updates.
    assert [lines[n]["batch/unfinished_groups"] for n in (3, 6)] == [0, 0]
    assert max(line["batch/staleness/max"] for line in lines) == 2
    assert all(line["batch/expired_groups"] == line["batch/dropped_groups"] == 0 for line in lines)
    records = [r for f in sorted((whole / "rollouts").iterdir()) for r in read_jsonl(f)]
    assert 4 * sum(line["batch/kept_groups"] for line in lines) == len(records)
    several = [r["version_tokens"] for r in records if len(r.get("version_tokens", ())) > 1]
    assert several
    for record in records:
        counts = record.get("version_tokens", {})
        assert not counts or sum(counts.values()) == record["num_tokens"]
        assert not counts or min(map(int, counts)) == record["weight_version"]
    # Trainer and engine agree on every token, whichever weights sampled it.
    means = [line.get("training/rollout_probs_diff_mean", 0.0) for line in lines]
    assert max(means) < 1e-4


def test_a_run_killed_while_responses_wait_ends_with_the_same_bits(
    whole: Path,
    qlrl: Any,
    start_qlrl: Any,
    kill_when: Any,
    write_config: Any,
    read_jsonl: Any,
    untimed: Any,
    tmp_path: Path,
) -> None:
    config, run = write_config(tmp_path, **SECTIONS), tmp_path / "run"
    saved = run / "checkpoints" / "step_00000002"
    kill_when(start_qlrl("rl", config), saved.is_dir, delay_s=random.uniform(0.0, 0.2))
    newest = sorted((run / "checkpoints").glob("step_????????"))[-1]
    waiting = read_state(newest)["sampler"]["waiting"]
    assert any(response["goes_on"] for group in waiting for response in group["responses"])
    done = qlrl("rl", config).check()
    assert f"resuming from {newest}" in done.out
    assert same_weights(whole, run)
    for file in (whole / "rollouts").iterdir():
        assert file.read_bytes() == (run / "rollouts" / file.name).read_bytes(), file.name
    here, there = (untimed(read_jsonl(r / "metrics.jsonl")) for r in (whole, run))
    assert here == there
