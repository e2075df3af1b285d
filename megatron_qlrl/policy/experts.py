"""A mixture of experts in place of each layer's MLP, and how evenly its experts are used.

Experts are divided over the expert parallel ranks (`policy.ep`) and never cut themselves. A token
travels to its experts' ranks and back (Megatron's all-to-all dispatcher), and no token is ever
dropped. There is no balancing loss: reinforcement learning keeps the routing that it is given, and
`expert_balance` shows how even that is. `tests/dist_cpu/test_experts.py` compares log-probs and
gradients with transformers in every layout.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_qlrl.config.shape import Experts
from megatron_qlrl.parallel.context import ParallelContext
from megatron_qlrl.platform.device import has_transformer_engine


class CountingRouter(TopKRouter):
    """Megatron's router, which also counts the tokens of each expert ([experts]) in passes with a
    gradient. A recomputed layer has a gradient only in its second pass, so it counts once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens: torch.Tensor | float = 0.0

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        if has_transformer_engine():
            return super().gating(input)
        # Megatron 0.16's own product ends here in an undefined name (`te_general_gemm`).
        exact = torch.promote_types(input.dtype, torch.float32)
        return F.linear(input.to(exact), self.weight.to(exact))

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = super().routing(logits, padding_mask)
        if torch.is_grad_enabled():
            self.tokens = self.tokens + chosen.sum(0, dtype=torch.float64)
        return weights, chosen


def expert_settings(experts: Experts, context: ParallelContext, *, grouped: bool) -> dict[str, Any]:
    """Returns the fields of Megatron's config for a model with experts.

    `grouped` computes a rank's experts in one grouped product (Transformer Engine).
    """
    return {
        "num_moe_experts": experts.num,
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_router_topk": experts.per_token,
        # A softmax over all experts whose chosen values are divided by their sum is a softmax over
        # the chosen ones, which is what Megatron computes without the softmax before.
        "moe_router_pre_softmax": not experts.normalise,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": context.ep.size,
        "expert_tensor_parallel_size": 1,
    }


def expert_spec(*, grouped: bool) -> ModuleSpec:
    """Returns the spec of a layer's experts: one after another in Megatron's own linear layers, or
    all of a rank's in Transformer Engine's grouped ones."""
    if grouped:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelGroupedLinear,
            TERowParallelGroupedLinear,
        )

        kind: Any = TEGroupedMLP
        linear = MLPSubmodules(
            linear_fc1=TEColumnParallelGroupedLinear,  # pyright: ignore
            linear_fc2=TERowParallelGroupedLinear,  # pyright: ignore
        )
    else:
        kind = SequentialMLP
        linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(module=kind, submodules=linear)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(experts=experts, router=CountingRouter),
    )


def prepare_experts(model: torch.nn.Module) -> None:
    """Makes up for two things in Megatron 0.16's layers with experts.

    At expert parallel size 1 it sums the gradients of experts over data parallel ranks, though
    tensor parallel ranks see other tokens of a row; marked weights are summed over all ranks that
    hold the same experts. And its dispatcher keeps the last weights of the router, and with them
    the graph that made them: after a recomputed layer, its input and the input's gradient.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            for weight in module.experts.parameters():
                weight.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
                # Grouped weights lack the mark that makes the gradient norm count those of every
                # tensor parallel rank.
                weight.tensor_model_parallel = True  # pyright: ignore
            dispatcher: Any = module.token_dispatcher
            dispatcher.combine_postprocess = partial(
                _combine_and_forget, dispatcher, dispatcher.combine_postprocess
            )


def _combine_and_forget(dispatcher: Any, combine: Any, tokens: torch.Tensor) -> torch.Tensor:
    output = combine(tokens)
    dispatcher.probs = dispatcher.routing_map = None
    dispatcher.reversed_local_input_permutation_mapping = None
    return output


def forget_counts(model: torch.nn.Module) -> None:
    """Sets the counts of all routers to 0."""
    for router in _routers(model):
        router.tokens = 0.0


def expert_balance(model: torch.nn.Module) -> dict[str, float]:
    """Returns how even the experts were used since `forget_counts`, the same on every rank, as
    means over the layers; {} for a dense model. Collective.

    actor/expert_load_max_over_mean: tokens of the busiest expert over those of the mean one.
    actor/expert_idle_fraction: experts that got no token.
    """
    routers = _routers(model)
    if not routers:
        return {}
    config = routers[0].config
    counts = torch.zeros(config.num_layers, config.num_moe_experts, dtype=torch.float64)
    for router in routers:
        counts[router.layer_number - 1] += torch.as_tensor(router.tokens).cpu()
    counts = counts.to(next(model.parameters()).device)
    dist.all_reduce(counts)
    peak = counts.amax(1) / counts.mean(1).clamp(min=1e-9)
    return {
        "actor/expert_load_max_over_mean": float(peak.mean()),
        "actor/expert_idle_fraction": float((counts == 0).double().mean()),
    }


def _routers(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, CountingRouter)]
