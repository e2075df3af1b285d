"""Builds Megatron's optimizer; the learning rate is a pure function of the step."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_qlrl.config.schema import OptimizerConfig
from megatron_qlrl.platform.device import has_gpu


def wrap_data_parallel(
    model: Any, *, distributed_optimizer: bool, overlap_grad_reduce: bool
) -> DistributedDataParallel:
    """Wraps the model in Megatron's DDP, which SUMS the gradients of data and context parallel
    ranks (the loss is a weighted sum), in float32."""
    wrapped = DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=model.config.params_dtype is torch.bfloat16,
            use_distributed_optimizer=distributed_optimizer,
            overlap_grad_reduce=overlap_grad_reduce,
        ),
        module=model,
    )
    if overlap_grad_reduce:
        model.config.no_sync_func = wrapped.no_sync  # of all rows but the last
    return wrapped


def build_optimizer(model: Any, config: OptimizerConfig, *, distributed: bool) -> Any:
    dtype = model.config.params_dtype
    built = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
        ),
        [model],
    )
    if not has_gpu():
        # torch's fused AdamW, one pass over each parameter in place of a dozen. Megatron does not
        # pass the choice on; on GPUs it takes Transformer Engine's or Apex's fused one by itself.
        for group in built.param_groups:
            group["fused"] = True
    return built


def fresh_moments(optimizer: Any) -> None:
    """Makes Adam's two moments, all 0, in place of those that there are. Adam itself would make
    them in its first update, when an engine may already have sized its cache by what was free."""
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        inner.state.clear()
        part.init_state_fn(inner, part.config)
        for group in inner.param_groups:
            group.pop("step", None)  # fused optimizers count here, torch's for each parameter
        if isinstance(inner, torch.optim.Adam):
            for state in inner.state.values():
                state["step"] = torch.tensor(0.0)


def learning_rate(config: OptimizerConfig, *, step: int, total_steps: int) -> float:
    """Returns the rate of optimizer step `step` (from 0): linear warm-up, then linear to the
    minimum."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(total_steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    return config.lr * (1 - (1 - config.min_lr_ratio) * progress)


def apply_settings(optimizer: Any, config: OptimizerConfig, *, rate: float) -> None:
    """Gives every parameter group its settings, because a loaded checkpoint brings the settings
    that it was saved with."""
    settings = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    for group in optimizer.param_groups:
        group.update(settings, lr=rate)


def clip_and_step(optimizer: Any, norm: Any, *, max_norm: float) -> None:
    """Takes the optimizer's step on gradients that `prepare_grads` has prepared and whose norm is
    `norm`. Megatron's own `step` would prepare them and compute their norm once more."""
    for part in optimizer.chained_optimizers:
        if parameters := part.get_parameters():  # a rank's shard may be empty
            clip_grad_by_total_norm_fp32(parameters, max_norm=max_norm, total_norm=norm)
    optimizer.step_with_ready_grads()
