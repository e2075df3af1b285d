"""Reads what the rest of the package needs to know from a `config.json` (torch-free)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_qlrl.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
ARCHITECTURES = (
    "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM",
)  # fmt: skip

Size = Annotated[int, Field(gt=0, lt=2**31)]
Factor = Annotated[float, Field(ge=1, le=1000)]
Positive = Annotated[float, Field(gt=0)]
Theta = Annotated[float, Field(gt=1)]


class _Sizes(BaseModel):
    """The fields of config.json that are read, of these types and no others."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)
    num_hidden_layers: int = Field(gt=0, le=1000)
    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    vocab_size: Size
    max_position_embeddings: Size
    rms_norm_eps: Positive
    tie_word_embeddings: bool = False
    rope_theta: Theta | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


class _ExpertSizes(BaseModel):
    """The fields of config.json on the experts. transformers 5 writes num_local_experts."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    num_experts: Size = Field(validation_alias=AliasChoices("num_experts", "num_local_experts"))
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    norm_topk_prob: bool = False


class _Rope(BaseModel):
    """RoPE parameters of one type: unknown ones are errors, for they may change the angles."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    rope_type: str
    rope_theta: Theta
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None


class _Linear(_Rope):
    factor: Factor


class _Yarn(_Rope):
    factor: Factor
    original_max_position_embeddings: Size
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    truncate: bool | None = None


class _Llama3(_Rope):
    factor: Factor
    original_max_position_embeddings: Size
    low_freq_factor: Positive
    high_freq_factor: Positive

    @model_validator(mode="after")
    def _ordered(self) -> "_Llama3":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")
        return self


class _LongRope(_Rope):
    original_max_position_embeddings: Size
    short_factor: list[Positive]
    long_factor: list[Positive]


# "dynamic" is missing, because its angles change with the length of each sequence: packed rows
# cannot follow that, and vLLM 0.32 does not either.
ROPE_TYPES: dict[str, type[_Rope]] = {
    "default": _Rope, "linear": _Linear, "yarn": _Yarn, "llama3": _Llama3, "longrope": _LongRope,
}  # fmt: skip

_COPY = "copy the complete file of the model"
_QUANTISED = (
    "its weights are quantised and cannot be trained; dequantise the model first (load it with "
    "transformers in bfloat16, model.dequantize(), model.save_pretrained) or download the original"
)
# Variants of the architectures that would run, and compute something else.
_ONLY: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("quantization_config", (None,), _QUANTISED),
    ("compression_config", (None,), _QUANTISED),
    ("hidden_act", ("silu",), "the MLP of the supported architectures is gated SiLU"),
    ("use_sliding_window", (None, False), "every layer must attend to the whole context"),
    ("dual_chunk_attention_config", (None,), "every layer must attend to the whole context"),
    ("mlp_bias", (None, False), "the MLP has no biases"),
    ("bias", (None, False), "the linear layers have no biases"),
    ("partial_rotary_factor", (None, 1), "RoPE turns the whole head"),
    ("original_max_position_embeddings", (None,), "write it into rope_parameters"),
    ("decoder_sparse_step", (None, 1), "every layer must have experts"),
    ("mlp_only_layers", (None, []), "every layer must have experts"),
    ("shared_expert_intermediate_size", (None, 0), "experts shared by all tokens are not trained"),
)


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that stands for the MLP of every layer.

    Attributes:
        num: experts of a layer, of which each token uses `per_token`.
        ffn_size: the size inside an expert.
        normalise: the weights of a token's experts are divided by their sum.
    """

    num: int
    per_token: int
    ffn_size: int
    normalise: bool


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    Attributes:
        ffn_size: the size inside the MLP; no part of a model with experts has it.
        experts: None for a dense model.
        tied: the LM head is the embedding, and Hugging Face folders have no tensor for it.
        max_position_embeddings: what config.json must say beside `rope`: transformers and vLLM
            0.32 take it for the scaled length with every type but linear.
        rope: the Hugging Face dict (rope_type, rope_theta …), complete.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    rope: Mapping[str, Any]
    experts: Experts | None = None

    @property
    def max_positions(self) -> int:
        """The number of positions with RoPE scaling: for YaRN the original number times
        the factor (`max_position_embeddings` is that), for llama3 and longrope
        `max_position_embeddings`, for linear that times the factor."""
        scale = self.rope["factor"] if self.rope["rope_type"] == "linear" else 1
        return int(self.max_position_embeddings * scale)

    @property
    def untied(self) -> "ModelShape":
        """The same model with an LM head of its own, as the rollout engine always holds it."""
        return replace(self, tied=False)

    def position_fields(self) -> dict[str, Any]:
        """The fields of config.json that give other software these positions and angles."""
        return {
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": dict(self.rope),
        }

    @classmethod
    def from_hf(
        cls,
        hf: Mapping[str, Any],
        rope_scaling: Mapping[str, Any] | None = None,
        *,
        where: str = "the model's config.json",
    ) -> "ModelShape":
        """Reads the fields, with Hugging Face's defaults where a field may be absent.

        Args:
            rope_scaling: `model.rope_scaling` of the run: parameters that win over the model's;
                with another rope_type, only those of them that it knows are left.

        Raises:
            ConfigError: the architecture, or a variant of it, is not supported, or a field is
                missing or of a wrong type.
        """
        architecture = _architecture(hf, where)
        sizes = _validated(_Sizes, hf, where)
        heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
        kv_heads = kv_heads or heads
        head_dim = sizes.head_dim or sizes.hidden_size // heads
        if heads % kv_heads:
            raise ConfigError(
                f"{where}: num_attention_heads={heads} is no multiple of "
                f"num_key_value_heads={kv_heads}; {_COPY}"
            )
        if head_dim % 2 or not head_dim:
            raise ConfigError(
                f"{where}: head_dim is {head_dim}, and must be even for RoPE turns pairs; {_COPY}"
            )
        rope = _rope(sizes, rope_scaling or {}, where)
        _check_longrope(rope, head_dim, where)
        positions = sizes.max_position_embeddings
        if rope["rope_type"] == "yarn":
            positions = int(rope["original_max_position_embeddings"] * rope["factor"])
        return cls(
            num_layers=sizes.num_hidden_layers,
            hidden_size=sizes.hidden_size,
            ffn_size=sizes.intermediate_size,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=sizes.vocab_size,
            max_position_embeddings=positions,
            rms_eps=sizes.rms_norm_eps,
            tied=sizes.tie_word_embeddings,
            qkv_bias=architecture == "Qwen2ForCausalLM",
            qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
            rope=rope,
            experts=_experts(hf, where) if architecture == "Qwen3MoeForCausalLM" else None,
        )


def read_shape(folder: str | Path, *, rope_scaling: Mapping[str, Any] | None) -> ModelShape:
    """Returns the shape of the model in a Hugging Face folder, of which only config.json is read.

    Args:
        rope_scaling: the run's `model.rope_scaling`; None leaves the folder's own.

    Raises:
        ConfigError: there is no folder or no such file, or as `ModelShape.from_hf`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"model folder {folder} does not exist; set model.path to a downloaded Hugging Face "
            "folder (config.json, *.safetensors, tokenizer)"
        )
    file = folder / "config.json"
    return ModelShape.from_hf(read_json(file), rope_scaling, where=str(file))


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a model folder.

    Raises:
        ConfigError: the file is missing, or holds something else.
    """
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; is {file.parent} a Hugging Face model folder?")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(
            f"{file} is not readable JSON: {error}; copy the file of the model again"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a {type(value).__name__}, expected a JSON object")
    return cast("dict[str, Any]", value)


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Returns the vocabulary size, padded so that each tp shard is a multiple of 8."""
    step = 8 * tp
    return -(-vocab_size // step) * step


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model with its shape: the manifest that model folders,
    weight sync, import and export are checked against."""
    h, d = shape.hidden_size, shape.head_dim
    q, kv = shape.num_heads * d, shape.num_kv_heads * d
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, h),
        "model.norm.weight": (h,),
    }
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocab_size, h)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
        "self_attn.q_proj.weight": (q, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, q),
    }
    if shape.experts is None:
        layer |= _mlp_shapes("mlp", h, shape.ffn_size)
    else:
        layer["mlp.gate.weight"] = (shape.experts.num, h)
        for i in range(shape.experts.num):
            layer |= _mlp_shapes(f"mlp.experts.{i}", h, shape.experts.ffn_size)
    if shape.qkv_bias:
        layer |= {
            "self_attn.q_proj.bias": (q,),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.bias": (kv,),
        }
    if shape.qk_norm:
        layer |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
    for i in range(shape.num_layers):
        shapes |= {f"model.layers.{i}.{name}": size for name, size in layer.items()}
    return shapes


def _mlp_shapes(prefix: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (ffn, hidden),
        f"{prefix}.up_proj.weight": (ffn, hidden),
        f"{prefix}.down_proj.weight": (hidden, ffn),
    }


def _experts(hf: Mapping[str, Any], where: str) -> Experts:
    sizes = _validated(_ExpertSizes, hf, where)
    num, per_token = sizes.num_experts, sizes.num_experts_per_tok
    if per_token > num:
        raise ConfigError(
            f"{where}: num_experts_per_tok={per_token} is more than num_experts={num}; {_COPY}"
        )
    if per_token == 1 and sizes.norm_topk_prob:
        raise ConfigError(
            f"{where} has num_experts_per_tok=1 with norm_topk_prob=true, which is not supported: "
            "a token's only expert always has weight 1, and the router could not be trained"
        )
    return Experts(num, per_token, sizes.moe_intermediate_size, sizes.norm_topk_prob)


def _architecture(hf: Mapping[str, Any], where: str) -> str:
    names = hf.get("architectures")
    name = cast("Any", names[0] if isinstance(names, list) and names else names)
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"{where}: model architecture {short(name) if name else '(none)'} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    for key, allowed, why in _ONLY:
        if key in hf and hf[key] not in allowed:
            raise ConfigError(f"{where} has {key}={short(hf[key])}, which is not supported: {why}")
    if name != "Qwen2ForCausalLM" and hf.get("attention_bias"):
        raise ConfigError(f"{where}: {name} with attention_bias=true is not supported")
    layers = cast("Any", hf.get("layer_types") or [])
    if not isinstance(layers, list) or any(
        kind != "full_attention" for kind in cast("list[Any]", layers)
    ):
        raise ConfigError(
            f"{where} has layer_types={short(layers)}, which is not supported: every layer must "
            "attend to the whole context (full_attention)"
        )
    return name


def _rope(sizes: _Sizes, scaling: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Reads transformers 4's spelling (rope_theta, rope_scaling) and 5's (rope_parameters)."""
    own = dict(sizes.rope_scaling or sizes.rope_parameters or {})
    scaling = dict(scaling)
    for parameters in (own, scaling):
        if "type" in parameters:  # an old name
            parameters.setdefault("rope_type", parameters.pop("type"))
    kind = scaling.get("rope_type", own.get("rope_type", "default"))
    mend = _COPY
    if scaling:
        where, mend = f"model.rope_scaling, with what {where} has", "change the setting"
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ConfigError(
            f"{where}: rope_type {short(kind)} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    known = ROPE_TYPES[kind].model_fields
    if own.get("rope_type", "default") != kind:
        own = {name: value for name, value in own.items() if name in known}
    default = {"rope_theta": sizes.rope_theta or 10_000.0}
    if "original_max_position_embeddings" in known:
        default["original_max_position_embeddings"] = sizes.max_position_embeddings
    values = default | own | scaling | {"rope_type": kind}
    read = _validated(ROPE_TYPES[kind], values, f"{where}: RoPE scaling", mend)
    return read.model_dump(exclude_none=True, exclude={"partial_rotary_factor"})


def _check_longrope(rope: dict[str, Any], head_dim: int, where: str) -> None:
    """transformers takes the long factors for a sequence beyond the original length, vLLM for all
    where the engine's limit is beyond it: a run, whose sequences grow, has one set of angles."""
    if rope["rope_type"] != "longrope":
        return
    lengths = {len(rope["short_factor"]), len(rope["long_factor"])}
    if lengths != {head_dim // 2}:
        raise ConfigError(
            f"{where}: short_factor and long_factor need {head_dim // 2} numbers each; {_COPY}"
        )
    rope["short_factor"] = rope["long_factor"]


def _validated(kind: type[M], values: Mapping[str, Any], where: str, mend: str = _COPY) -> M:
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        problems = "; ".join(_explain(item) for item in error.errors())
        raise ConfigError(f"{where}: {problems}; {mend}") from error


def _explain(item: Any) -> str:
    name = ".".join(short(part).strip("'") for part in item["loc"])
    if item["type"] == "missing":
        return f"lacks '{name}'"
    if item["type"] == "extra_forbidden":
        return f"does not know '{name}'"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    return f"{name}: {item['msg']} (got {short(item['input'])})"


def short(value: Any) -> str:
    """Returns a short form of any value, for a message."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
