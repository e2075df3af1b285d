"""A checkpoint that would run code where it is read is refused by name, and runs nothing."""

import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from checkpoints import Payload, entry, pickled_file, state, tampered, text, within_metadata
from harness import run_ranks, tiny_hf
from test_policy_parity import make_policy

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.weights.checkpoint import CheckpointStore, load_checkpoint, load_weights

EXTRA = "decoder.layers.mlp.linear_fc2._extra_state/shard_0_2"
NORM = "decoder.final_layernorm.weight"
EMBEDDING = "embedding.word_embeddings.weight"


def attacks(payload: Payload) -> dict[str, Callable[[Path], None]]:
    """By what the message must say."""
    return {
        r"weights/\.metadata is refused: it names posix\.mkdir": pickled_file(".metadata", payload),
        r"weights/\.metadata is refused: it names posix": within_metadata(payload),
        r"weights/common\.pt is refused: .* plain values": pickled_file("common.pt", payload),
        rf"is refused: what it holds as {EXTRA} is no tensor": entry(EXTRA, [payload]),
        rf"weights/\.metadata is refused: .* {NORM} is an object": entry(NORM, [payload]),
        rf"weights/\.metadata is refused: .* {EMBEDDING} is an object": entry(EMBEDDING, payload),
        r"weights/metadata\.json is refused": text(
            "weights/metadata.json", '{"sharded_backend": "zarr"}'
        ),
        r"weights/metadata\.json is refused: .* list": text("weights/metadata.json", "[]"),
        r"does not hold the state .* list": text("state.json", "[]"),
        r"does not hold the state .* nested too deeply": text("state.json", "[" * 100_000),
        r"does not hold the state .* str as step": state(step="os.system"),
    }


def check_case(rank: int, case: tuple[Path, Path]) -> None:
    folder, out = case
    policy, _ = make_policy(folder, (1, 1, 1))
    model, optimizer = policy.model, policy.optimizer
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    store = CheckpointStore(out, keep=1, warn=print)
    good = store.save(1, model=model, optimizer=optimizer, state={"step": 1})
    store.wait()
    marker = out / "marker"
    # By this torch means that callers who do not say otherwise unpickle anything.
    with patch.dict(os.environ, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}):
        for number, (message, tamper) in enumerate(attacks(Payload(marker)).items()):
            path = tampered(good, out / f"attack_{number}", tamper)
            with pytest.raises(CheckpointError, match=message):
                load_checkpoint(path, model=model, optimizer=optimizer)
            with pytest.raises(CheckpointError, match=message):
                load_weights(path, model=model)
            assert not marker.exists(), message
    for parameter in model.parameters():
        parameter.data.zero_()
    assert load_checkpoint(good, model=model, optimizer=optimizer)["step"] == 1
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]), name


def test_nothing_is_run_and_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run_ranks(check_case, 1, [(tiny_hf(tmp_path / "hf", "qwen2"), tmp_path / "out")])
