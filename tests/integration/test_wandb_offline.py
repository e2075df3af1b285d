"""The real wandb, offline: a run is written and resumed under its id."""

from pathlib import Path

from megatron_qlrl.config.schema import LoggingConfig
from megatron_qlrl.metrics.sinks import Tracker


def test_offline_run_is_written_and_resumed(tmp_path: Path) -> None:
    config = LoggingConfig.model_validate({"wandb": "offline", "project": "tests"})
    first = Tracker(tmp_path, config=config, run_name="toy", resolved={"lr": 0.1}, state=None)
    first.log(1, {"actor/loss": 0.5})
    state = first.state_dict()
    first.close()
    run_id = state["wandb_id"]
    assert run_id
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))) == 1
    second = Tracker(tmp_path, config=config, run_name="toy", resolved={"lr": 0.1}, state=state)
    second.log(2, {"actor/loss": 0.25})
    assert second.state_dict() == {"step": 2, "lines": 2, "wandb_id": run_id}
    second.close()
