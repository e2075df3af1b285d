"""How far float32 may be from the exact values: as far as a peer's float32 on the same machine.

Rounding differs between processors, thread counts and libraries, so a fixed bound is true only of
the machine that it was written on. Exact values are computed in float64, and a peer that is known
to be right (transformers, dense attention) computes the same in float32 here and now.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

MAX_RATIO, RMS_RATIO, UNITS = 3.0, 1.5, 8
"""Largest and root-mean-square error over the peer's, and what is added to both, in units in the
last place (float32) of the largest and of the root-mean-square value: a peer may be exact."""


@dataclass(frozen=True)
class Reference:
    """Exact values, and the largest and root-mean-square error that are allowed."""

    exact: np.ndarray
    max_error: float
    rms_error: float

    @classmethod
    def of(cls, exact: Any, peer: Any) -> "Reference":
        """`exact` in float64 and what the peer has in float32: arrays of one shape, not empty."""
        exact, peer = np.asarray(exact), np.asarray(peer)
        assert exact.dtype == np.float64
        assert exact.shape == peer.shape and exact.size
        error = peer - exact
        return cls(
            exact,
            MAX_RATIO * np.abs(error).max() + UNITS * _unit(np.abs(exact).max()),
            RMS_RATIO * rms(error) + UNITS * _unit(rms(exact)),
        )

    def check(self, ours: Any, what: Any = "") -> None:
        """`ours` is as near to the exact values as the peer, up to the ratios above."""
        ours = np.asarray(ours)
        assert ours.shape == self.exact.shape, (what, ours.shape, self.exact.shape)
        error = ours.astype(np.float64) - self.exact
        # Written so that NaN is refused too.
        assert np.abs(error).max() <= self.max_error, (what, np.abs(error).max(), self.max_error)
        assert rms(error) <= self.rms_error, (what, rms(error), self.rms_error)

    def check_mean(self, mean: float, what: Any = "") -> None:
        """A mean of all values: its error is at most the root-mean-square of theirs."""
        error = abs(mean - self.exact.mean())
        assert error <= self.rms_error, (what, error, self.rms_error)

    def check_norm(self, norm: float, what: Any = "") -> None:
        """The norm of all values: its error is at most the norm of theirs."""
        error = abs(norm - np.linalg.norm(self.exact))
        allowed = self.rms_error * self.exact.size**0.5
        assert error <= allowed, (what, error, allowed)


def pooled(tensors: Mapping[str, Any], exact: Mapping[str, Any]) -> np.ndarray:
    """All tensors as one vector, each in units of the root mean square of its exact values: how
    rounding falls on a tensor of few numbers is luck, on all together it is not. An expert that got
    no token has a gradient of 0."""
    assert tensors.keys() == exact.keys()
    return np.concatenate([np.ravel(np.asarray(tensors[n]) / (rms(exact[n]) or 1)) for n in exact])


def transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a Hugging Face folder by transformers: exact in float64, the peer in float32.

    Rotary angles are float32 in both, as in every implementation: they belong to the model.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).to(dtype)
    if dtype == torch.float64:
        for module in model.modules():  # their own forward passes go through float32
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = partial(_norm, module)
            if type(module).__name__.endswith("TopKRouter"):
                module.forward = partial(_route, module)
    return model


def gradients(model: Any) -> dict[str, np.ndarray]:
    """The gradient of each tensor of a model folder, in which an expert's tensors stand alone."""
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.numpy()
        if name.endswith(".experts.gate_up_proj"):
            for expert, both in enumerate(grad):
                gate, up = np.split(both, 2)
                prefix = name.replace("gate_up_proj", str(expert))
                tensors |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
        elif name.endswith(".experts.down_proj"):
            for expert, down in enumerate(grad):
                tensors[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
        else:
            tensors[name] = grad
    return tensors


def _norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    scale = (hidden.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    return module.weight * hidden * scale


def _route(module: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.nn.functional.linear(hidden.reshape(-1, module.hidden_dim), module.weight)
    weights, chosen = logits.softmax(-1).topk(module.top_k, dim=-1)
    if module.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights, chosen


def rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values), dtype=np.float64))))


def _unit(value: float) -> float:
    """The distance of a float32 of this size to the next one."""
    return float(np.spacing(np.float32(value)))
