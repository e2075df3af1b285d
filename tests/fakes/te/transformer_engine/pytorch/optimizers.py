"""AdamW as Transformer Engine keeps it: one `step` for a group, float32 moments for a parameter."""

from collections.abc import Callable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(p, dtype=torch.float32))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                mean = state["exp_avg"].lerp_(p.grad, 1 - first) / (1 - first ** group["step"])
                square = state["exp_avg_sq"].lerp_(p.grad**2, 1 - second)
                spread = (square / (1 - second ** group["step"])).sqrt()
                p.sub_(group["lr"] * mean / (spread + group["eps"]))


class FusedSGD:
    pass


def multi_tensor_applier(op: Callable[..., Any], flag: Any, lists: Any, *args: Any) -> Any:
    return op(lists, *args)


def multi_tensor_scale(lists: Any, factor: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def multi_tensor_scale_tensor(lists: Any, factor: torch.Tensor) -> None:
    """Megatron 0.19 keeps norm and factor on the device when there is this function."""
    assert isinstance(factor, torch.Tensor)
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def multi_tensor_l2norm(lists: Any, per_tensor: bool) -> tuple[torch.Tensor, None]:
    assert not per_tensor
    return torch.stack([t.float().norm() for t in lists[0]]).norm()[None], None
