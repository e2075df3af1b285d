"""A checkpoint restores weights, optimizer and the next step under other layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks, tiny_hf
from test_policy_parity import LOSS, groups_of, make_policy

from megatron_qlrl.packing.microbatch import make_rows
from megatron_qlrl.weights.checkpoint import CheckpointStore, load_checkpoint, torn
from megatron_qlrl.weights.stream import WeightStream


def train(policy: Any, context: Any, steps: int) -> list[float]:
    rows = make_rows(
        groups_of(policy.shape.vocab_size),
        num_ranks=context.dp.size,
        max_tokens=64,
        share_prompts=True,
        aggregation="token_mean",
        constant_tokens=1,
        cost=lambda prompt, responses: prompt + sum(responses),
    )[context.dp.rank]
    return [policy.update(rows, LOSS, lr=1e-3)["actor/grad_norm"] for _ in range(steps)]


def weights(policy: Any, context: Any) -> dict[str, torch.Tensor]:
    stream = WeightStream(policy.model, shape=policy.shape, context=context, bucket_bytes=10**6)
    return {name: tensor.clone() for name, tensor in stream}


def check_case(rank: int, case: tuple[str, Path, tuple[int, int, int], bool, Path]) -> None:
    action, folder, layout, distributed, out = case
    policy, context = make_policy(folder, layout, distributed_optimizer=distributed)
    store = CheckpointStore(out, keep=1, warn=print)
    if action == "save":
        train(policy, context, 2)
        store.save(2, model=policy.model, optimizer=policy.optimizer, state={"step": 2})
        saved = weights(policy, context)
        norms = train(policy, context, 2)
        final = weights(policy, context)
        if rank == 0:
            torch.save({"norms": norms, "saved": saved, "weights": final}, out / "expected.pt")
        return
    path = store.newest()
    assert path is not None and torn(path) is None
    assert load_checkpoint(path, model=policy.model, optimizer=policy.optimizer) == {"step": 2}
    expected = torch.load(out / "expected.pt", weights_only=True)
    for name, tensor in weights(policy, context).items():
        assert torch.equal(tensor, expected["saved"][name]), name
    norms = train(policy, context, 2)
    same_layout = action == "same"
    for name, tensor in weights(policy, context).items():
        if same_layout:
            assert torch.equal(tensor, expected["weights"][name]), name
        else:
            difference = (tensor - expected["weights"][name]).abs().max()
            assert difference < 2e-6, (action, layout, name, float(difference))
    assert norms == (
        expected["norms"] if same_layout else pytest.approx(expected["norms"], rel=1e-4)
    )


@pytest.mark.parametrize("distributed", [False, True])
def test_checkpoint_continues_bitwise_and_reshards(tmp_path: Path, distributed: bool) -> None:
    folder = tiny_hf(tmp_path / "hf", "qwen2")
    out = tmp_path / "checkpoints"
    out.mkdir()
    cases = [("save", (2, 1, 1)), ("same", (2, 1, 1)), ("load", (1, 2, 1)), ("load", (1, 1, 1))]
    run_ranks(check_case, 2, [(a, folder, layout, distributed, out) for a, layout in cases])


def test_torn_checkpoints_are_recognised(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000001"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights/a").write_bytes(b"abc")
    assert "manifest" in (torn(folder) or "")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # sha256("abc")
    (folder / "manifest.json").write_text(json.dumps({"weights/a": digest}))
    assert torn(folder) is None
    (folder / "weights/a").write_bytes(b"abd")
    assert "checksum" in (torn(folder) or "")
    (folder / "weights/a").unlink()
    assert "missing" in (torn(folder) or "")
