"""What the fast tier has of whole runs: a short warm-up SFT by the real command line."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tools.make_reference import undocumented


def test_sft_learns_and_leaves_a_model(
    answering_model: Path, base_model: Path, read_jsonl: Any
) -> None:
    record = read_jsonl(answering_model.parent / "metrics.jsonl")
    losses = [line["sft/nll"] for line in record if "sft/nll" in line]
    assert len(losses) == 20
    # The base gives its answers no form; 20 steps teach most of it.
    assert losses[-1] < 0.7 * losses[0]
    start, end = (load_file(f / "model.safetensors") for f in (base_model, answering_model))
    assert start.keys() == end.keys()
    assert all(tensor.isfinite().all() for tensor in end.values())
    assert not [name for name, tensor in end.items() if torch.equal(tensor, start[name])]
    assert (answering_model / "tokenizer.json").is_file()
    assert (answering_model.parent / "report.html").is_file()
    (start,) = read_jsonl(answering_model.parent / "starts.jsonl")
    assert {"commit", "world_size", "device", "python", "torch", "vllm"} <= start.keys()


def test_metrics_are_in_the_glossary(answering_model: Path, read_jsonl: Any) -> None:
    record = read_jsonl(answering_model.parent / "metrics.jsonl")
    assert undocumented({name for line in record for name in line} - {"step"}) == []
