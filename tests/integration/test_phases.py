"""Two phases with another layout each, by one command; killed at the boundary (test_slurm.py has
the same run stopped and killed within its phases).

Runs: whole (the reference), and cut (killed and started again).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tools.make_reference import undocumented


@pytest.fixture(scope="module")
def whole(phased_run: Any) -> Any:
    return phased_run


@pytest.fixture(scope="module")
def cut(
    qlrl: Any,
    start_qlrl: Any,
    kill_when: Any,
    write_config: Any,
    phased_sections: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    folder = tmp_path_factory.mktemp("cut")
    config = write_config(folder, **phased_sections)
    boundary = folder / "run" / "checkpoints" / "step_00000002"
    kill_when(start_qlrl("rl", config, "--processes", "2"), boundary.is_dir)
    done = qlrl("rl", config, "--processes", "2").check()
    return folder / "run", done


def test_phases_see_their_lengths_layouts_and_settings(whole: Any, read_jsonl: Any) -> None:
    run, done = whole
    record = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in record] == [0, 1, 2, 3]
    assert [line["curriculum/phase"] for line in record] == [0, 0, 1, 1]
    assert [line["batch/kept_groups"] for line in record] == [4, 4, 6, 6]
    assert [line["actor/lr"] for line in record] == [5e-4, 5e-4, 1e-4, 1e-4]
    assert f"resuming from {run}/checkpoints/step_00000002 at step 2" in done.out
    short, long = record[1], record[2]
    assert short["prompt_length/max"] <= 250 < long["prompt_length/max"] <= 500
    assert record[3]["curriculum/carried/drawn"] > 0
    assert undocumented({name for line in record for name in line} - {"step"}) == []
    for line in record[2:]:
        carried = line["curriculum/carried/batch/groups"]
        assert 0 < carried <= 3
    assert [line["batch/held_groups"] > 0 for line in record] == [True] * 4
    assert short["batch/staleness/max"] == record[3]["batch/staleness/max"] == 1
    assert long["batch/staleness/max"] == 0  # what waited is of another phase
    assert long["batch/expired_groups"] == short["batch/held_groups"]


def test_parts_of_the_steps_sum_to_them(whole: Any, read_jsonl: Any) -> None:
    """Within 2 %. Checkpoints and evaluations lie between steps."""
    run, _ = whole
    lines = [m for m in read_jsonl(run / "metrics.jsonl") if "timing_s/step" in m]
    parts = "update_weights probe gen reward adv self_check ref old_log_prob update_actor".split()
    known = {f"timing_s/{name}" for name in (*parts, "step", "save_checkpoint")}
    assert {n for m in lines for n in m if n.startswith("timing_s/")} <= known
    steps = sum(m["timing_s/step"] for m in lines)
    assert 0.98 * steps < sum(m.get(f"timing_s/{p}", 0.0) for m in lines for p in parts) <= steps


def test_prompts_beyond_the_last_phase_are_reported(whole: Any) -> None:
    _, done = whole
    report = "longer than every phase allows (500 tokens) and are left out (train: "
    assert done.out.count(report) == 2  # once for each process


def test_reference_is_renewed_at_the_boundary(whole: Any, read_jsonl: Any) -> None:
    run, _ = whole
    kl = [line["actor/kl_loss"] for line in read_jsonl(run / "metrics.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-12)
    assert kl[2] == pytest.approx(0, abs=1e-9)
    assert kl[1] > 1e-7 and kl[3] > 1e-7


def test_killed_run_has_the_same_record(
    whole: Any, cut: Any, read_jsonl: Any, untimed: Any
) -> None:
    here, there = (untimed(read_jsonl(run / "metrics.jsonl")) for run, _ in (whole, cut))
    assert here == there


def test_killed_run_draws_the_same_prompts_and_tokens(whole: Any, cut: Any) -> None:
    for step in range(4):
        here, there = (run / "rollouts" / f"step_{step:06d}.jsonl" for run, _ in (whole, cut))
        assert here.read_bytes() == there.read_bytes(), step


def test_killed_run_ends_with_the_same_weights(whole: Any, cut: Any, base_model: Path) -> None:
    here, there = (load_file(run / "hf" / "model.safetensors") for run, _ in (whole, cut))
    assert not [name for name in here if not torch.equal(here[name], there[name])]
    start = load_file(base_model / "model.safetensors")
    boundary = load_file(whole[0] / "references" / "phase_1" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in here:
            assert not torch.equal(start[name], boundary[name])
            assert not torch.equal(boundary[name], here[name])
