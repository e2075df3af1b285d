"""A closed reading of config.json: numbers of positions by hand; each mistake is one message."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_qlrl.config.shape import Experts, ModelShape, hf_shapes, read_shape
from megatron_qlrl.errors import ConfigError

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 160,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "original_max_position_embeddings": 8192,
    "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "scaling", "positions", "written"),
    [
        ({}, None, 32_768, 32_768),
        ({}, YARN, 131_072, 131_072),
        ({"rope_scaling": YARN}, None, 131_072, 131_072),  # as Qwen2.5's cards tell to write it
        ({"rope_parameters": YARN, "max_position_embeddings": 131_072}, None, 131_072, 131_072),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, None, 65_536, 65_536),
        ({"max_position_embeddings": 256}, {"rope_type": "yarn", "factor": 2.5}, 640, 640),
        ({"rope_scaling": YARN}, {"factor": 2.0}, 65_536, 65_536),
        ({"rope_scaling": YARN}, {"rope_type": "default"}, 32_768, 32_768),
        ({"rope_scaling": LLAMA3, "max_position_embeddings": 131_072}, None, 131_072, 131_072),
        ({"rope_scaling": LONG, "max_position_embeddings": 65_536}, None, 65_536, 65_536),
        # transformers leaves the number as it was, and vLLM 0.32 multiplies it.
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, None, 65_536, 32_768),
    ],
)
def test_number_of_positions(
    changes: dict[str, Any], scaling: dict[str, Any] | None, positions: int, written: int
) -> None:
    shape = ModelShape.from_hf(HF | changes, scaling)
    assert shape.max_positions == positions
    assert shape.position_fields()["max_position_embeddings"] == written
    # A released model, trained on, has the same positions: nothing is multiplied twice.
    again = ModelShape.from_hf(HF | changes | shape.position_fields() | {"rope_scaling": None})
    assert again == shape
    assert ModelShape.from_hf(HF | shape.position_fields(), scaling) == shape


def test_parameters_of_another_type_are_left_behind() -> None:
    shape = ModelShape.from_hf(HF | {"rope_scaling": LLAMA3}, YARN)
    assert shape.rope == {"rope_theta": 1e6, **YARN}


def test_longrope_has_one_set_of_angles() -> None:
    shape = ModelShape.from_hf(HF | {"rope_scaling": LONG})
    assert shape.rope["short_factor"] == shape.rope["long_factor"] == [2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported; .*Qwen2"),
        ({"architectures": None}, r"architecture \(none\) is not supported"),
        ({"architectures": [["x"]]}, "is not supported"),
        ({"num_attention_heads": "8"}, r"num_attention_heads: .*valid integer \(got '8'\)"),
        ({"num_attention_heads": 0}, r"num_attention_heads: .*greater than 0 \(got 0\)"),
        ({"num_attention_heads": None}, r"num_attention_heads: .*valid integer \(got None\)"),
        ({"num_attention_heads": True}, "num_attention_heads: .*valid integer"),
        ({"num_attention_heads": 6}, "=6 is no multiple of num_key_value_heads=4"),
        ({"num_key_value_heads": -1}, "num_key_value_heads: .*greater than 0"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers: .*less than or equal to 1000"),
        ({"hidden_size": 10**30}, "hidden_size: .*less than 2147483648"),
        ({"hidden_size": 64.5}, "hidden_size: .*valid integer"),
        ({"head_dim": 7}, "head_dim is 7, and must be even"),
        ({"hidden_size": 4}, "head_dim is 0"),
        ({"vocab_size": [160]}, "vocab_size: .*valid integer"),
        ({"max_position_embeddings": {}}, "max_position_embeddings: .*valid integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: .*finite"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: .*valid boolean"),
        ({"rope_theta": 0}, "rope_theta: .*greater than 1"),
        ({"rope_scaling": [4.0]}, "rope_scaling: .*valid dictionary"),
        ({"rope_scaling": "yarn"}, "rope_scaling: .*valid dictionary"),
        ({"rope_scaling": {"rope_type": "warp"}}, "rope_type 'warp' is not supported; .*yarn"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_type \['yarn'\] is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supp"),
        ({"rope_scaling": {"type": "linear"}}, "RoPE scaling: lacks 'factor'"),
        ({"rope_scaling": YARN | {"factor": "4"}}, r"factor: .*valid number \(got '4'\)"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor: .*greater than or equal to 1"),
        ({"rope_scaling": YARN | {"beta_fats": 32}}, "does not know 'beta_fats'"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "must be above low_freq_factor"),
        ({"rope_scaling": LONG | {"long_factor": [1.0]}}, "need 4 numbers each"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', which is not supported: .*SiLU"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*whole context"),
        ({"use_sliding_window": True}, "use_sliding_window=True, which is not supported"),
        ({"dual_chunk_attention_config": {}}, "dual_chunk_attention_config={}, which"),
        ({"mlp_bias": True}, "mlp_bias=True, which is not supported"),
        ({"attention_bias": True}, "LlamaForCausalLM with attention_bias=true"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised .*dequantise the model"),
    ],
)
def test_config_that_cannot_be_trained_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF | changes))
    with pytest.raises(ConfigError, match=message) as caught:
        read_shape(tmp_path, rope_scaling=None)
    assert str(caught.value).startswith(f"{tmp_path}/config.json")
    assert len(str(caught.value)) < 400


def test_missing_field() -> None:
    hf = {name: value for name, value in HF.items() if name != "hidden_size"}
    with pytest.raises(ConfigError, match="lacks 'hidden_size'; copy the complete file"):
        ModelShape.from_hf(hf)


def test_rope_scaling_of_the_run_is_named_as_such() -> None:
    with pytest.raises(ConfigError, match=r"^model\.rope_scaling, .*lacks 'factor'; change the"):
        ModelShape.from_hf(HF, {"rope_type": "yarn"})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "is not readable JSON"),
        (b"\xff\xfe{}", "is not readable JSON: 'utf-8' codec"),
        (b"[" * 200_000, "is not readable JSON: maximum recursion"),
        (b'{"a":' * 200_000, "is not readable JSON: maximum recursion"),
        (b"[]", "holds a list, expected a JSON object"),
        (b"9" * 5000, "is not readable JSON: Exceeds the limit"),
    ],
)
def test_file_that_is_no_json_object(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ConfigError, match=message):
        read_shape(tmp_path, rope_scaling=None)


MOE = HF | {
    "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16, "num_experts": 16,
    "num_experts_per_tok": 4, "moe_intermediate_size": 24, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def test_experts_are_read_in_both_spellings() -> None:
    experts = Experts(num=16, per_token=4, ffn_size=24, normalise=True)
    assert ModelShape.from_hf(MOE).experts == experts
    # transformers 5 writes its own name.
    renamed = {("num_local_experts" if k == "num_experts" else k): v for k, v in MOE.items()}
    shape = ModelShape.from_hf(renamed)
    assert shape.experts == experts
    assert shape.qk_norm
    # 2 norms, 4 projections with 2 norms of their own, a router, and 3 matrices for each expert.
    assert len(hf_shapes(shape)) == 3 + 6 * (2 + 4 + 2 + 1 + 16 * 3)
    assert hf_shapes(shape)["model.layers.5.mlp.experts.15.down_proj.weight"] == (64, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\], which is not supported: every layer"),
        ({"decoder_sparse_step": 2}, r"decoder_sparse_step=2, which is not supported"),
        ({"shared_expert_intermediate_size": 32}, "experts shared by all tokens"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok=17 is more than num_experts=16"),
        ({"num_experts_per_tok": 1}, "the router could not be trained"),
    ],
)
def test_variants_of_experts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelShape.from_hf(MOE | changes)
