"""Weights there and back: Hugging Face -> Megatron (tp, pp) -> Hugging Face, bit for bit;
the same Megatron tensors as mbridge loads; and a released model that answers as it was seen to.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from harness import run_ranks, tiny_hf
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from megatron_qlrl.config.schema import PolicyConfig
from megatron_qlrl.config.shape import padded_vocab, read_shape
from megatron_qlrl.parallel.context import init_parallel
from megatron_qlrl.platform.megatron_cpu import megatron_device
from megatron_qlrl.policy.model import build_model
from megatron_qlrl.weights.stream import load_hf
from tests.parity import Reference, transformers_model

VOCAB = 1061  # holds the toy tokenizer and divides by nothing
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {}),
    # Last: mbridge writes a tied model's head into a table that all its Qwen classes share.
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def models(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of the supported architectures with the toy tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, (kind, overrides) in MODELS.items():
        tiny_hf(folder / name, kind, vocab_size=VOCAB, **overrides)
        for file in TOKENIZER_FILES:
            shutil.copy(base_model / file, folder / name)
    return {name: folder / name for name in MODELS}


@pytest.mark.parametrize(
    ("name", "tp", "pp"), [("qwen2", 1, 2), ("qwen3", 2, 1), ("llama", 2, 1), ("qwen2-tied", 2, 2)]
)
def test_import_and_export_are_bit_exact(
    qlrl: Any, models: dict[str, Path], tmp_path: Path, name: str, tp: int, pp: int
) -> None:
    qlrl("import", models[name], tmp_path / "ckpt", "--tp", tp, "--pp", pp).check()
    qlrl("export", tmp_path / "ckpt", tmp_path / "hf").check()
    here, there = (load_file(f / "model.safetensors") for f in (models[name], tmp_path / "hf"))
    assert here.keys() == there.keys()
    for key, tensor in here.items():
        assert there[key].dtype == tensor.dtype, key
        assert torch.equal(there[key], tensor), key
    released, shape = (read_shape(p, rope_scaling=None) for p in (tmp_path / "hf", models[name]))
    assert released == shape
    for file in TOKENIZER_FILES:
        assert (tmp_path / "hf" / file).read_bytes() == (models[name] / file).read_bytes()
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert sum(p.numel() for p in again.parameters()) == sum(t.numel() for t in here.values())


@pytest.mark.parametrize("tp", [1, 2])
def test_same_megatron_tensors_as_mbridge(models: dict[str, Path], tp: int) -> None:
    pytest.importorskip("mbridge")
    run_ranks(_compare_with_mbridge, tp, [(models[name], tp) for name in MODELS])


# mbridge knows the names of Transformer Engine, where these norms are part of the next layer.
ENGINE_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def _compare_with_mbridge(rank: int, case: tuple[Path, int]) -> None:
    """mbridge cannot build its model without Transformer Engine; it fills one of ours, with its
    own names, transforms and tensor parallel split."""
    from mbridge import AutoBridge

    folder, tp = case
    context = init_parallel(tp=tp, pp=1, cp=1, seed=0)
    shape = read_shape(folder, rope_scaling=None)
    policy = PolicyConfig.model_validate({"tp": tp})
    with megatron_device():
        ours, theirs = (
            build_model(shape, policy, dtype=torch.float32, context=context) for _ in range(2)
        )
        for model in (ours, theirs):
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))
        load_hf(folder, ours, shape=shape, context=context)
        bridge: Any = AutoBridge.from_pretrained(folder, dtype=torch.float32)
        bridge.vocab_size, bridge.padded_vocab_size = VOCAB, padded_vocab(VOCAB, tp)
        bridge.make_vocab_size_divisible_by = padded_vocab(VOCAB, tp)
        hf_names = bridge._weight_name_mapping_mcore_to_hf
        bridge._weight_name_mapping_mcore_to_hf = lambda name: hf_names(_engine_name(name))
        with torch.no_grad():
            bridge.load_weights([theirs], str(folder))
    expected = dict(theirs.named_parameters())
    found = dict(ours.named_parameters())
    assert found.keys() == expected.keys()
    assert len(found) >= 7 * shape.num_layers
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), (folder.name, rank, name)


def _engine_name(name: str) -> str:
    for local, engine in ENGINE_NAMES.items():
        if name.endswith(f".{local}"):
            return name.removesuffix(local) + engine
    return name


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.fixture(scope="module")
def stretched_run(qlrl: Any, write_config: Any, base_model: Path, tmp_path_factory: Any) -> Path:
    """As `finished_run`, with a model of 256 positions that YaRN stretches to 1024."""
    folder = tmp_path_factory.mktemp("stretched")
    shutil.copytree(base_model, folder / "short-model")
    file = folder / "short-model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 256}))
    config = write_config(
        folder,
        model={"path": str(folder / "short-model"), "rope_scaling": YARN},
        phases=[
            {"name": "phase1", "max_input_tokens": 250, "steps": 1},
            {"name": "phase2", "max_input_tokens": 1000, "steps": 1},
        ],
        evaluation={"max_input_tokens": 5000},  # cut to what 1024 positions leave
    )
    qlrl("rl", config).check()
    return folder / "run"


def test_yarn_stretches_training_and_release(stretched_run: Path, read_jsonl: Any) -> None:
    record = read_jsonl(stretched_run / "metrics.jsonl")
    _, long = (line for line in record if "prompt_length/mean" in line)
    assert 256 < long["prompt_length/mean"] < long["prompt_length/max"] <= 1000
    assert long["training/rollout_logprobs_diff_max"] < 1e-4
    config = json.loads((stretched_run / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 1024
    rope = {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 256}
    assert config["rope_parameters"] == rope
    assert "| base model | `short-model` |" in (stretched_run / "hf" / "README.md").read_text()


@pytest.mark.parametrize("run", ["finished_run", "stretched_run"])
def test_released_model_answers_as_the_engine_did(
    request: pytest.FixtureRequest, run: str, toy_data: Path, read_jsonl: Any
) -> None:
    """Every token of the last evaluation (greedy) is transformers' choice too, with the same
    log-probability; a tie within rounding may go either way."""
    from transformers import AutoTokenizer

    folder: Path = request.getfixturevalue(run)
    answers = read_jsonl(folder / "eval" / "phase2.jsonl")
    assert len(answers) == 16
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    models = [transformers_model(folder / "hf", d) for d in (torch.float64, torch.float32)]
    rows = {
        f"{stem}:{i}": row
        for stem in ("eval_short", "eval_long")
        for i, row in enumerate(pq.read_table(toy_data / f"{stem}.parquet").to_pylist())
    }
    exact, peer, behind = [], [], 0.0
    lengths: list[int] = []
    for answer in answers:
        assert answer["response"] == tokenizer.decode(answer["token_ids"], skip_special_tokens=True)
        prompt = tokenizer.apply_chat_template(
            rows[answer["uid"]]["prompt"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        lengths.append(len(prompt))
        tokens = torch.tensor(answer["token_ids"])
        for model, chosen in zip(models, (exact, peer), strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer["token_ids"]])).logits[0]
            logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
            chosen.append(logprobs.gather(1, tokens[:, None])[:, 0])
            if model is models[0]:
                behind = max(behind, float((logprobs.max(-1).values - chosen[-1]).max()))
        assert answer["finished"] == (answer["token_ids"][-1] == tokenizer.eos_token_id)
    assert min(lengths) < 256 < max(lengths) <= 1000  # also beyond the original positions
    bounds = Reference.of(torch.cat(exact), torch.cat(peer))
    bounds.check([p for answer in answers for p in answer["logprobs"]])
    assert behind <= 2 * bounds.max_error


def test_evaluations_are_there_and_the_card_has_those_of_phase_ends(finished_run: Path) -> None:
    found = sorted(file.stem for file in (finished_run / "eval").glob("*.json"))
    assert found == ["phase1", "phase2", "step_3"]  # evaluation.every_steps is 3
    card = (finished_run / "hf" / "README.md").read_text()
    assert "| benchmark | questions | `phase1` | `phase2` |" in card and "step_3" not in card


def test_model_card_and_config_of_a_released_run(finished_run: Path, base_model: Path) -> None:
    card = (finished_run / "hf" / "README.md").read_text()
    scores = json.loads((finished_run / "eval" / "phase2.json").read_text())
    results = ModelCard(card).data.eval_results  # pyright: ignore[reportAttributeAccessIssue]
    assert {r.metric_name: r.metric_value for r in results} == {
        name: round(scores[name], 4) for name in ("val/eval_short/score", "val/eval_long/score")
    }
    assert "| `phase1` | 250 | 2 of 2 |" in card and "| `phase2` | 1,000 | 2 of 2 |" in card
    assert str(finished_run.parents[1]) not in card  # no folder of this machine
    config = json.loads((finished_run / "hf" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert (
        config["vocab_size"] == json.loads((base_model / "config.json").read_text())["vocab_size"]
    )
    weights = load_file(finished_run / "hf" / "model.safetensors")
    assert all(np.isfinite(tensor.numpy()).all() for tensor in weights.values())
