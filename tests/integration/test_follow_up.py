"""The options of QwenLong-L1.5 together: tasks in equal shares, the advantage by task, the loss by
group, entropy control; kill -9 while it masks."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def config_of(write_config: Any, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a run's config: its data has nine prompts of one task for each of the other."""
    train = tmp_path_factory.mktemp("tasks") / "train.parquet"
    table = pq.read_table(toy_data / "train.parquet")
    names = [
        "toy_docqa_rare" if number // 2 % 10 == 0 else "toy_docqa_common"
        for number in range(table.num_rows)
    ]
    place = table.schema.get_field_index("data_source")
    pq.write_table(table.set_column(place, "data_source", pa.array(names)), train)

    def make(folder: Path) -> Path:
        return write_config(
            folder,
            data={"train_files": [str(train)], "eval_files": []},
            curriculum={"tasks": {"rare": 1, "*": 1}, "carried_share": 0.25},
            algorithm={
                "advantage_std": "task",
                "aggregation": "group_mean",
                # Any entropy is above 0.002, so that masking begins with the second update.
                "entropy_band": [0.001, 0.002],
                "updates_per_step": 2,
            },
            evaluation={"every_steps": None, "at_phase_end": False},
        )

    return make


@pytest.fixture(scope="module")
def whole(qlrl: Any, config_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    qlrl("rl", config_of(folder)).check()
    return folder / "run"


def test_tasks_are_drawn_in_equal_shares(whole: Path, read_jsonl: Any) -> None:
    lines = read_jsonl(whole / "metrics.jsonl")
    assert len(lines) == 4
    drawn = [{task: line[f"task/{task}/batch/groups"] for task in ("rare", "*")} for line in lines]
    assert drawn == [{"rare": 2, "*": 2}] * 4
    assert [line["curriculum/task/rare/drawn"] for line in lines] == [2, 4, 2, 4]
    shown = Counter(
        json.loads(line)["data_source"]
        for file in (whole / "rollouts").iterdir()
        for line in file.read_text().splitlines()
    )
    assert shown["toy_docqa_rare"] == shown["toy_docqa_common"]


def test_masking_begins_with_the_second_update(whole: Path, read_jsonl: Any) -> None:
    lines = read_jsonl(whole / "metrics.jsonl")
    assert all(line["actor/response_entropy"] > 0.002 for line in lines)
    assert [line["actor/aepo_masking"] for line in lines] == [0.5, 1.0, 1.0, 1.0]


def test_killed_while_it_masks_it_ends_with_the_same_weights(
    whole: Path,
    qlrl: Any,
    start_qlrl: Any,
    kill_when: Any,
    config_of: Any,
    read_jsonl: Any,
    untimed: Any,
    tmp_path: Path,
) -> None:
    config, run = config_of(tmp_path), tmp_path / "run"
    saved = run / "checkpoints" / "step_00000002"
    kill_when(start_qlrl("rl", config), saved.exists)
    assert json.loads((saved / "state.json").read_text())["trainer"] == {"masking": True}
    assert not (run / "hf").exists()
    assert "resuming from" in qlrl("rl", config).check().out
    here, there = (load_file(r / "hf" / "model.safetensors") for r in (whole, run))
    assert not [name for name in here if not torch.equal(here[name], there[name])]
    lines, again = (untimed(read_jsonl(r / "metrics.jsonl")) for r in (whole, run))
    assert lines == again
