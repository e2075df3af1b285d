"""bfloat16 weights without a GPU: the mixed precision of a cluster (float32 weights in the
optimizer, float32 gradients), from the first step to the released folder."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def test_run_resumes_bitwise_and_its_release_is_bfloat16(
    qlrl: Any, write_config: Any, read_jsonl: Any, untimed: Any, tmp_path: Path
) -> None:
    there, again = tmp_path / "whole", tmp_path / "again"
    whole = there / "run"
    qlrl("rl", write_config(there, model={"dtype": "bfloat16"})).check()
    released = load_file(whole / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in released.values()} == {torch.bfloat16}
    record = untimed(read_jsonl(whole / "metrics.jsonl"))
    # Rounding to 8 bits must show, and must not be more than that.
    assert 1e-5 < record[0]["training/rollout_probs_diff_mean"] < 1e-2

    shutil.copytree(whole, again / "run")
    shutil.rmtree(again / "run" / "hf")
    shutil.rmtree(again / "run" / "checkpoints" / "step_00000004")
    config = write_config(again, model={"dtype": "bfloat16"})
    refused = qlrl("rl", config, "model.dtype=float32")
    assert refused.code == 2
    assert "the weights' type: bfloat16 -> float32" in refused.messages[0]
    assert "step_00000003 at step 3" in qlrl("rl", config).check().out
    assert untimed(read_jsonl(again / "run" / "metrics.jsonl")) == record
    resumed = load_file(again / "run" / "hf" / "model.safetensors")
    assert not [name for name, tensor in released.items() if not torch.equal(tensor, resumed[name])]
