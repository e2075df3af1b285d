"""A run that a huge learning rate ruins in its second phase keeps and releases its best weights,
ends early, and does the same after kill -9 around the choice."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

GOOD = 4
"""Steps of the first phase, after which the score is best."""
SETTINGS = {
    "phases": [
        {"name": "good", "max_input_tokens": 250, "steps": GOOD},
        {
            "name": "bad",
            "max_input_tokens": 1000,
            "steps": 20,
            "overrides": {"optimizer": {"lr": 0.05}},
        },
    ],
    "rollout": {"prompts_per_step": 32, "group_size": 8},
    "policy": {"max_tokens_per_row": 8192},
    "algorithm": {"entropy_coef": 0.0, "updates_per_step": 2},
    "optimizer": {"lr": 6.0e-4, "weight_decay": 0.0},
    "evaluation": {"every_steps": 2, "patience": 2},
    "checkpoint": {"every_steps": 50, "keep": 1, "keep_best": True, "release": "best"},
}


@pytest.fixture(scope="module")
def config_of(write_config: Any, toy_data: Path) -> Any:
    def write(folder: Path) -> Path:
        files = {"eval_files": [str(toy_data / "eval_short.parquet")]}
        return write_config(folder, data=files, **SETTINGS)

    return write


@pytest.fixture(scope="module")
def whole(qlrl: Any, config_of: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("whole")
    done = qlrl("rl", config_of(folder)).check()
    return folder / "run", done.out + done.err


def best_step(run: Path) -> int:
    """By hand, from what was logged: the newest of the highest scores."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    scores = [(line["val/score"], line["step"] + 1) for line in lines if "val/score" in line]
    return max(scores)[1]


def test_best_weights_are_kept_and_released_and_the_run_ends_early(
    whole: tuple[Path, str], qlrl: Any, tmp_path: Path
) -> None:
    run, said = whole
    best = best_step(run)
    kept = [int(f.name.removeprefix("step_")) for f in (run / "checkpoints").iterdir()]
    assert best <= GOOD < max(kept) < GOOD + 20
    assert sorted(kept) == [best, max(kept)]
    assert "2 evaluations in a row were not better than the best one, " in said
    qlrl("export", run / "checkpoints" / f"step_{best:08d}", tmp_path / "hf").check()
    ours, theirs = (load_file(f / "model.safetensors") for f in (run / "hf", tmp_path / "hf"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    card = (run / "hf" / "README.md").read_text()
    assert f"after {best} steps |" in card and f"after {max(kept)} steps |" in card
    assert f"| steps done | {best} |" in card


def test_a_finished_run_says_the_same_again(whole: tuple[Path, str], qlrl: Any) -> None:
    run, _ = whole
    before = (run / "hf" / "model.safetensors").read_bytes()
    done = qlrl("rl", run / "config.yaml").check()
    assert "the run ends early" in done.out
    assert (run / "hf" / "model.safetensors").read_bytes() == before


def test_kill_around_the_choice_changes_nothing(
    whole: tuple[Path, str],
    qlrl: Any,
    start_qlrl: Any,
    kill_when: Any,
    config_of: Any,
    tmp_path: Path,
) -> None:
    config, record = config_of(tmp_path), tmp_path / "run" / "metrics.jsonl"
    best = best_step(whole[0])

    def chosen() -> bool:
        """Whether the best evaluation is logged; its checkpoint is being written."""
        lines = record.read_text().splitlines() if record.is_file() else []
        return any('"val/score"' in line and f'"step": {best - 1}' in line for line in lines)

    kill_when(start_qlrl("rl", config), chosen, delay_s=random.uniform(0.0, 0.3))
    qlrl("rl", config).check()
    ours, theirs = (run / "hf" / "model.safetensors" for run in (tmp_path / "run", whole[0]))
    assert ours.read_bytes() == theirs.read_bytes()
    states = [
        json.loads((sorted((run / "checkpoints").glob("step_*"))[-1] / "state.json").read_text())
        for run in (tmp_path / "run", whole[0])
    ]
    assert states[0]["evaluation"] == states[1]["evaluation"]
