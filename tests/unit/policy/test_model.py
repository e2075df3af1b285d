"""Vocabulary padding by hand; rotary frequencies against transformers; FP8 that cannot run."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_qlrl.config.schema import PolicyConfig
from megatron_qlrl.config.shape import ModelShape, padded_vocab
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.policy import model
from megatron_qlrl.policy.model import rope_frequencies


@pytest.mark.parametrize(
    ("vocab", "tp", "want"),
    [(152064, 1, 152064), (152064, 8, 152064), (157, 1, 160), (157, 4, 160), (161, 4, 192),
     (1, 2, 16)],
)  # fmt: skip
def test_vocabulary_divides_into_shards_of_eights(vocab: int, tp: int, want: int) -> None:
    assert padded_vocab(vocab, tp) == want


HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}


def test_default_frequencies_by_hand() -> None:
    shape = ModelShape.from_hf(HF | {"head_dim": 4, "rope_theta": 100.0})
    frequencies, factor = rope_frequencies(shape)
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1]))
    assert factor == 1.0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
         "original_max_position_embeddings": 1024},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_frequencies_are_those_of_transformers(rope: dict[str, Any]) -> None:
    shape = ModelShape.from_hf(HF | {"rope_parameters": rope})
    frequencies, factor = rope_frequencies(shape)
    names = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")
    theirs = LlamaRotaryEmbedding(LlamaConfig(**{n: HF[n] for n in names}, rope_parameters=rope))
    torch.testing.assert_close(frequencies, theirs.inv_freq)
    assert factor == pytest.approx(theirs.attention_scaling)
    if rope["rope_type"] == "yarn":
        assert factor == pytest.approx(0.1 * math.log(4.0) + 1)


def test_long_factors_hold_for_every_length() -> None:
    """transformers takes them for sequences beyond the original length alone, vLLM for all."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 1024,
            "short_factor": [1.0] * 8, "long_factor": [1.5 * 2**n for n in range(8)]}  # fmt: skip
    frequencies, factor = rope_frequencies(ModelShape.from_hf(HF | {"rope_parameters": rope}))
    exponents = torch.arange(0, 16, 2) / 16
    want = 1 / (torch.tensor(rope["long_factor"]) * 1e4**exponents)
    torch.testing.assert_close(frequencies, want)
    assert factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(1024)))


def test_fp8_that_the_machine_cannot_run_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(config: Any) -> None:
        raise AssertionError("Device compute capability 10.0 or higher required.")

    monkeypatch.setattr(model, "get_fp8_context", refuse)
    shape = ModelShape.from_hf(HF)
    policy = PolicyConfig.model_validate({"fp8": "e4m3", "fp8_recipe": "mxfp8"})
    one = SimpleNamespace(size=1, rank=0)
    alone: Any = SimpleNamespace(tp=one, pp=one, cp=one)
    with pytest.raises(ConfigError, match="needs Transformer Engine's layers, which do not load"):
        model.build_model(shape, policy, dtype=torch.bfloat16, context=alone)
    monkeypatch.setattr(model, "has_transformer_engine", lambda: True)
    with pytest.raises(ConfigError, match=r"fp8_recipe=mxfp8 does not run here: Device compute .*"
                       r"10\.0 .*\. Set policy\.fp8_recipe=tensorwise"):  # fmt: skip
        model.build_model(shape, policy, dtype=torch.bfloat16, context=alone)
