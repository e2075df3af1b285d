"""What the rest of the package needs to know of a Hugging Face `config.json` (torch-free)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qlrl.errors import ConfigError

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder. `rope` is the Hugging Face rope dict (rope_type, rope_theta …)."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    rope: Mapping[str, Any]

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelShape":
        """Reads the fields, with Hugging Face's defaults where a field may be absent.

        Raises:
            ConfigError: the architecture, or a variant of it, is not supported.
        """
        names = hf.get("architectures") or ["(none)"]
        if names[0] not in ARCHITECTURES:
            raise ConfigError(
                f"model architecture {names[0]} is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        for key, bad in (("use_sliding_window", True), ("mlp_bias", True)):
            if hf.get(key, False) == bad:
                raise ConfigError(f"model config has {key}={bad}, which is not supported")
        if names[0] != "Qwen2ForCausalLM" and hf.get("attention_bias", False):
            raise ConfigError(f"{names[0]} with attention_bias=true is not supported")
        heads = hf["num_attention_heads"]
        return cls(
            architecture=names[0],
            num_layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            ffn_size=hf["intermediate_size"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            vocab_size=hf["vocab_size"],
            max_positions=hf["max_position_embeddings"],
            rms_eps=hf["rms_norm_eps"],
            tied=hf.get("tie_word_embeddings", False),
            qkv_bias=names[0] == "Qwen2ForCausalLM",
            qk_norm=names[0] == "Qwen3ForCausalLM",
            rope=_rope(hf),
        )


def read_shape(folder: str | Path) -> ModelShape:
    """Shape of the model in a Hugging Face folder."""
    return ModelShape.from_hf(json.loads((Path(folder) / "config.json").read_text()))


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Vocabulary size padded so that it divides into tp shards of a multiple of 8."""
    step = 8 * tp
    return -(-vocab_size // step) * step


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings: transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", hf.get("rope_theta", 10_000.0))
    return rope
