"""Hugging Face shape -> Megatron GPT. Two layer specs: Megatron's own layers (CPU, or a GPU
without Transformer Engine) and Transformer Engine's (FP8). Both use `SegmentAttention`."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_qlrl.config.schema import PolicyConfig
from megatron_qlrl.config.shape import ModelShape, padded_vocab
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.parallel.context import ParallelContext
from megatron_qlrl.platform.device import has_gpu, has_transformer_engine
from megatron_qlrl.policy.attention import AttentionPlan, SegmentAttention
from megatron_qlrl.policy.experts import expert_settings, expert_spec, prepare_experts
from megatron_qlrl.policy.offload import layer_inputs_on_host


class PolicyModel(GPTModel):
    """Megatron's GPT, whose last stage returns hidden states; logits are never built.

    Rotary embeddings come from the micro-batch's own position ids, so packing, shared prompts
    and context parallelism need nothing else.
    """

    inv_freq: torch.Tensor

    def __init__(self, shape: ModelShape, *, offload_activations: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.offload_activations = offload_activations
        self.rotary_pos_emb = None  # angles come from position_ids
        self.register_buffer("inv_freq", rope_frequencies(shape)[0], persistent=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, token_ids: torch.Tensor, position_ids: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """token_ids, position_ids [1, L] -> [L, 1, hidden] ([L / tp, ...] with sequence
        parallelism): the hidden states after this stage (and the final norm, on the last)."""
        states = None
        if self.pre_process:
            states = self.embedding(input_ids=token_ids, position_ids=position_ids)
        angles = position_ids[0].to(self.inv_freq.dtype)[:, None] * self.inv_freq
        hidden_size = self.config.hidden_size
        with layer_inputs_on_host(hidden_size) if self.offload_activations else nullcontext():
            return self.decoder(
                hidden_states=states,
                attention_mask=None,
                rotary_pos_emb=torch.cat([angles, angles], -1)[:, None, None, :],
                packed_seq_params=plan,
            )

    def output_weight(self) -> torch.Tensor:
        """Returns this rank's vocabulary shard of the LM head, [padded_vocab / tp, hidden]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        weight = self.output_layer.weight
        assert weight is not None, "only the last stage has an LM head"
        return weight

    def predicting_states(self, states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Returns rows `index` of the last stage's output as [M, hidden], gathered from sequence
        parallel shards; the backward pass sums the vocabulary shards' gradients."""
        if self.config.sequence_parallel:
            states = tensor_parallel.gather_from_sequence_parallel_region(
                states, tensor_parallel_output_grad=True
            )
        else:
            states = tensor_parallel.copy_to_tensor_model_parallel_region(states)
        return states[:, 0].index_select(0, index)


class _RMSNorm(torch.nn.RMSNorm):
    """An RMSNorm for sequence parallelism, which Megatron's torch norm refuses. Its weight is
    marked, so that Megatron sums the weight's gradient over the tensor parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore


def rope_frequencies(shape: ModelShape) -> tuple[torch.Tensor, float]:
    """Returns (inverse frequencies float32 [head_dim / 2], attention factor) for any Hugging Face
    rope type (default, linear, yarn, llama3 …), from transformers' own functions."""
    rope = dict(shape.rope)
    if rope["rope_type"] == "default":
        exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        return 1.0 / rope["rope_theta"] ** exponent, 1.0
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters=rope,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return frequencies.float(), float(factor)


def transformer_config(
    shape: ModelShape, config: PolicyConfig, *, dtype: torch.dtype, context: ParallelContext
) -> TransformerConfig:
    """Returns Megatron's config for the model, our settings and the layout."""
    _, rope_factor = rope_frequencies(shape)
    recompute: dict[str, Any] = {}
    if config.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform",
                     "recompute_num_layers": 1}  # fmt: skip
    elif config.recompute == "selective":
        # Attention is not in the list: at long context it is most of the work and keeps little. Nor
        # is "layernorm": Transformer Engine's norms are parts of the linear layers, the MLP's is
        # recomputed with it, and without Transformer Engine Megatron 0.16 fails there.
        part = "moe" if shape.experts else "mlp"
        recompute = {"recompute_granularity": "selective", "recompute_modules": [part]}
    fp8: dict[str, Any] = {}
    if config.fp8 != "off":
        # With delayed scaling, ranks agree on the largest values after every micro-batch. Data
        # parallel ranks have different numbers of them and must not wait for each other.
        fp8 = {"fp8": config.fp8, "fp8_recipe": config.fp8_recipe, "tp_only_amax_red": True}
    experts: dict[str, Any] = {}
    if shape.experts:
        experts = expert_settings(shape.experts, context, grouped=has_transformer_engine())
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        # YaRN scales queries and keys; scaling their product by the square is the same.
        softmax_scale=shape.head_dim**-0.5 * rope_factor**2,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_eps,
        qk_layernorm=shape.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=context.tp.size,
        pipeline_model_parallel_size=context.pp.size,
        context_parallel_size=context.cp.size,
        sequence_parallel=config.sequence_parallel and context.tp.size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not has_gpu(),
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        # Micro-batches differ in length; 0.16 accepts that only with this dispatcher named,
        # for dense models too.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # The loss is a weighted sum: Megatron must add gradients up and divide by nothing.
        calculate_per_token_loss=True,
        **recompute,
        **fp8,
        **experts,
    )


def layer_spec(shape: ModelShape, *, transformer_engine: bool) -> ModuleSpec:
    """Returns the spec of one decoder layer with segment attention."""
    if transformer_engine:
        return _transformer_engine_spec(shape)
    norm = _RMSNorm if shape.qk_norm else IdentityOp
    # Checkpoints name the norms as Transformer Engine's layers do, which contain them, so that a
    # machine without a GPU can export what a GPU wrote. In front of experts it stands alone.
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if shape.experts:
        mlp = expert_spec(grouped=False)
    else:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        mlp = ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=_RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,  # pyright: ignore[reportArgumentType]
                    core_attention=SegmentAttention,  # pyright: ignore[reportArgumentType]
                    linear_proj=RowParallelLinear,
                    q_layernorm=norm,
                    k_layernorm=norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=_RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            sharded_state_dict_keys_map=names,
        ),
    )


def _transformer_engine_spec(shape: ModelShape) -> ModuleSpec:
    """Returns Megatron's Transformer Engine spec with our attention."""
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=shape.experts.num if shape.experts else None,
        moe_grouped_gemm=shape.experts is not None,
        qk_layernorm=shape.qk_norm,
    )
    attention = spec.submodules.self_attention  # pyright: ignore
    attention.submodules = replace(attention.submodules, core_attention=SegmentAttention)
    if shape.experts:
        spec.submodules.mlp = expert_spec(grouped=True)  # pyright: ignore
    return spec


def build_model(
    shape: ModelShape, config: PolicyConfig, *, dtype: torch.dtype, context: ParallelContext
) -> PolicyModel:
    """Returns this rank's part of the model with uninitialised weights; load them next.

    Raises:
        ConfigError: the GPU, CUDA or Transformer Engine cannot run policy.fp8_recipe.
    """
    megatron_config = transformer_config(shape, config, dtype=dtype, context=context)
    engine = has_transformer_engine()
    if config.fp8 != "off" and not engine:
        raise ConfigError(
            f"policy.fp8={config.fp8} needs Transformer Engine's layers, which do not load here "
            '(`python -c "from transformer_engine.pytorch import Linear"` says why); install it '
            "for this torch, or set policy.fp8=off"
        )
    _check_fp8_recipe(megatron_config)
    spec = layer_spec(shape, transformer_engine=engine)
    if engine:
        from megatron.core.extensions.transformer_engine import TENorm

        final_norm: Any = TENorm
    else:
        final_norm = _RMSNorm
    layers = shape.num_layers // context.pp.size
    block = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=final_norm)
    model = PolicyModel(
        shape,
        offload_activations=config.offload_activations,
        config=megatron_config,
        transformer_layer_spec=block,
        vocab_size=padded_vocab(shape.vocab_size, context.tp.size),
        max_sequence_length=shape.max_positions,
        pre_process=context.pp.rank == 0,
        post_process=context.is_last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
    )
    _mark_shards(model)
    prepare_experts(model)
    return model


def _check_fp8_recipe(config: TransformerConfig) -> None:
    """Enters FP8 once, so that Transformer Engine says now, and not in the first step, what the
    recipe lacks here (compute capability 9.0 and CUDA 12.9 for blockwise, 10.0 for mxfp8)."""
    try:
        with get_fp8_context(config):
            pass
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"policy.fp8_recipe={config.fp8_recipe} does not run here: {error} Set "
            "policy.fp8_recipe=tensorwise (any GPU with FP8) or policy.fp8=off"
        ) from error


def _mark_shards(model: torch.nn.Module) -> None:
    """Marks the weights that are cut over tensor parallel ranks, as Megatron does when it
    initialises them (we load them instead). A shard without the mark would count as a copy, and the
    gradient norm would take it from tensor parallel rank 0 alone."""
    cut = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        weight, dim = getattr(module, "weight", None), cut.get(type(module))
        # Some have no weight of their own (a tied LM head).
        if weight is not None and dim is not None and not hasattr(weight, "partition_dim"):
            set_tensor_model_parallel_attributes(weight, True, dim, 1)
