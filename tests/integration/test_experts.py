"""A mixture of experts through the real command line: two phases with real vLLM, kill -9 and
resume, export and its checks."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

LAYOUT = ("--processes", "2", "policy.tp=2", "policy.ep=2", "rollout.tp=2")


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    """A random Qwen3-MoE with the toy's tokenizer. vLLM's kernel for CPUs wants multiples of 32."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("moe")
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    config = Qwen3MoeConfig(
        vocab_size=-(-len(tokenizer) // 128) * 128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.1,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    for file in base_model.glob("*"):
        if file.name not in ("config.json", "model.safetensors", "README.md"):
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def whole(
    qlrl: Any, write_config: Callable[..., Path], moe_model: Path, tmp_path_factory: Any
) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    qlrl("rl", write_config(folder, model={"path": str(moe_model)}), *LAYOUT).check()
    return folder / "run"


def test_engine_and_trainer_agree(whole: Path, read_jsonl: Any) -> None:
    lines = [line for line in read_jsonl(whole / "metrics.jsonl") if "actor/grad_norm" in line]
    assert len(lines) == 4
    for line in lines:
        assert line["training/rollout_logprobs_diff_max"] < 1e-4
        assert line["training/rollout_probs_diff_mean"] < 1e-6
        assert 1 <= line["actor/expert_load_max_over_mean"] <= 8


def test_killed_run_ends_with_the_same_weights(
    whole: Path,
    qlrl: Any,
    start_qlrl: Any,
    kill_when: Any,
    write_config: Callable[..., Path],
    moe_model: Path,
    tmp_path: Path,
) -> None:
    config = write_config(tmp_path, model={"path": str(moe_model)})
    record = tmp_path / "run" / "metrics.jsonl"
    kill_when(
        start_qlrl("rl", config, *LAYOUT),
        lambda: record.is_file() and '"step": 2' in record.read_text(),
    )
    said = qlrl("rl", config, *LAYOUT).check().out
    assert "resuming from" in said
    here, there = (load_file(run / "hf" / "model.safetensors") for run in (whole, tmp_path / "run"))
    start = load_file(moe_model / "model.safetensors")
    assert here.keys() == there.keys() == start.keys()
    assert not [name for name in here if not torch.equal(here[name], there[name])]
    assert not [name for name in here if torch.equal(here[name], start[name])]


def test_export_and_its_checks(whole: Path, qlrl: Any, tmp_path: Path) -> None:
    """The export is one process's, of a checkpoint of two tensor and expert parallel ranks."""
    out = tmp_path / "hf"
    qlrl("export", whole / "checkpoints" / "step_00000004", out).check()
    here, there = (load_file(folder / "model.safetensors") for folder in (whole / "hf", out))
    assert here.keys() == there.keys()
    assert not [name for name in here if not torch.equal(here[name], there[name])]
    checked = qlrl("release", "check", out, "--checkpoint", whole / "checkpoints" / "step_00000004")
    checked.check()
    assert "8 in each layer, 2 for each token" in (out / "README.md").read_text()
