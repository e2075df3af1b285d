"""What of the importance weights is left when trainer and engine compute the same policy."""

from pathlib import Path
from typing import Any

import pytest


def test_a_nucleus_is_no_mismatch(
    qlrl: Any, write_config: Any, read_jsonl: Any, tmp_path: Path
) -> None:
    """Both sides are float32, so every weight is 1 but for rounding, whatever top-p cuts off and
    however the mini-batches divide the batch."""
    config = write_config(
        tmp_path,
        phases=[{"name": "one", "max_input_tokens": 500, "steps": 2}],
        rollout={"temperature": 0.7, "top_p": 0.95, "group_size": 8},
        algorithm={"rollout_is_threshold": 2.0, "updates_per_step": 2},
        optimizer={"lr": 1e-5},  # the toy stays unsure
        evaluation={"at_phase_end": False, "every_steps": None},
    )
    qlrl("rl", config).check()
    for line in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        assert line["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=1e-4)
        assert line["rollout_corr/rollout_is_ratio_fraction_high"] == 0
        assert line["training/rollout_logprobs_diff_max"] < 1e-3
        assert line["actor/entropy"] > 0.03
