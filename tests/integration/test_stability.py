"""Rules that fire in a real run: it goes back to a checkpoint, then stops with one, and resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

# Entropy is always below: at step 0 there is no checkpoint to go back to, at step 1 the run goes
# back to that of step 0, at step 2 it stops.
STABILITY = {"entropy_floor": "roll_back", "entropy_floor_nats": 100.0, "max_roll_backs": 1}
# Groups that wait must not outlive the weights of their sampling.
ALGORITHM = {"filter_groups": False, "oversampling": 1.5, "max_staleness": 4}
# Through generation, roll-back and resumption. Layer inputs do wait in copies; without a GPU the
# optimizer's state stays (tests/dist_cpu/test_offload.py moves it).
OFFLOAD: dict[str, Any] = {
    "optimizer": {"offload": True},
    "policy": {"recompute": "full", "offload_activations": True},
}


@pytest.fixture(scope="module")
def stopped(qlrl: Any, write_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("stability")
    config = write_config(folder, stability=STABILITY, algorithm=ALGORITHM, **OFFLOAD)
    return config, folder / "run", qlrl("rl", config)


def test_run_goes_back_and_stops_with_one_message(stopped: Any, read_jsonl: Any) -> None:
    _, run, done = stopped
    assert done.code == 2, done
    assert len(done.messages) == 1
    assert "step 2: entropy_floor: actor/entropy" in done.messages[0]
    assert "rolled back 1 times already" in done.messages[0]
    assert "step 0: entropy_floor" in done.out
    assert "there is no checkpoint to go back to" in done.out
    assert f"are those of {run}/checkpoints/step_00000001 again" in done.out
    record = [line for line in read_jsonl(run / "metrics.jsonl") if "stability/skipped" in line]
    assert [line["step"] for line in record] == [0, 1, 2]
    assert [line["stability/skipped"] for line in record] == [1, 1, 1]
    assert [line["stability/roll_backs"] for line in record] == [0, 0, 1]
    assert [line["batch/held_groups"] for line in record] == [2, 1, 2]
    # What waited at step 1 went with the roll-back.
    assert [line["batch/groups"] for line in record] == [6, 3, 6]


def test_stopped_run_resumes_to_its_end(
    stopped: Any, qlrl: Any, base_model: Path, read_jsonl: Any
) -> None:
    config, run, _ = stopped
    done = qlrl("rl", config, "stability.entropy_floor=ignore").check()
    assert f"resuming from {run}/checkpoints/step_00000003 at step 3" in done.out
    record = read_jsonl(run / "metrics.jsonl")
    last = next(line for line in record if line["step"] == 3)
    assert (last["stability/skipped"], last["stability/roll_backs"]) == (0, 1)
    start, end = (load_file(f / "model.safetensors") for f in (base_model, run / "hf"))
    assert any(not torch.equal(end[name], tensor) for name, tensor in start.items())
