"""Linear layers and norms. Tensor parallel: a column layer gathers its input where the sequence is
sharded and else sums its input's gradient; a row layer scatters or sums its output."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from .distributed import (
    Move,
    all_gather,
    all_reduce,
    reduce_scatter,
    same,
    set_tensor_model_parallel_attributes,
)
from .fp8 import FP8GlobalStateManager, record


class RMSNorm(torch.nn.RMSNorm):
    """Megatron 0.19 names the size normalized_shape, 0.16 hidden_size, its older name."""

    def __init__(
        self,
        *,
        normalized_shape: int | None = None,
        hidden_size: int | None = None,
        eps: float,
        sequence_parallel: bool,
        zero_centered_gamma: bool,
        params_dtype: torch.dtype,
        device: Any,
    ) -> None:
        size = normalized_shape or hidden_size
        assert size
        super().__init__(size, eps=eps, dtype=params_dtype, device=device)
        assert not zero_centered_gamma
        self.weight.sequence_parallel = sequence_parallel  # pyright: ignore

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state.numel() == 0


class LayerNorm(torch.nn.LayerNorm):
    """No model of ours has one."""


class Linear(torch.nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        assert not fuse_wgrad_accumulation
        assert parallel_mode in ("column", "row")
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.return_bias = bias, return_bias
        self.tp_group, self.tp_size = tp_group, tp_size
        self.parallel_mode = parallel_mode
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.save_original_input = False
        self._kept: torch.Tensor | None = None  # the FP8 weight, where it is kept
        self._seen_fp8 = 0
        if parallel_mode == "column":
            self.out_features = out_features // tp_size
        else:
            self.in_features = in_features // tp_size
        made = {"dtype": params_dtype, "device": device}
        # NaN shows a parameter that nobody fills.
        self.weight = torch.nn.Parameter(
            torch.full((self.out_features, self.in_features), torch.nan, **made)
        )
        set_tensor_model_parallel_attributes(self.weight, 0 if parallel_mode == "column" else 1)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(self.out_features, **made))
            if parallel_mode == "column":
                set_tensor_model_parallel_attributes(self.bias, 0)
            else:
                self.bias.sequence_parallel = sequence_parallel  # pyright: ignore
        else:
            self.bias = torch.empty(0, **made)
        if init_method is not None:
            init_method(self.weight)

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        return self._product(inp, is_first_microbatch)

    def _product(self, x: torch.Tensor, is_first_microbatch: bool | None) -> Any:
        record(x.shape[:-1].numel())  # of the shard: it is rounded before it travels
        if self.parallel_mode == "column" and self.tp_size > 1:
            moves = (all_gather, reduce_scatter) if self.sequence_parallel else (same, all_reduce)
            x = Move.apply(x, self.tp_group, *moves)
        out = functional.linear(x, self._weight(is_first_microbatch))
        if self.parallel_mode == "row" and self.tp_size > 1:
            moves = (reduce_scatter, all_gather) if self.sequence_parallel else (all_reduce, same)
            out = Move.apply(out, self.tp_group, *moves)
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out

    def _weight(self, is_first_microbatch: bool | None) -> torch.Tensor:
        """In FP8, that of the first micro-batch; the gradient is the weight's."""
        if not FP8GlobalStateManager.is_fp8_enabled():
            return self.weight
        self._seen_fp8 += 1
        if is_first_microbatch is None or is_first_microbatch or self._kept is None:
            self._kept = self.weight.detach().clone()
        return self.weight + (self._kept - self.weight).detach()

    def get_extra_state(self) -> torch.Tensor:
        """Bytes once the layer has run in FP8 (before 2.20 for every recipe), empty before."""
        size = 8 if self._seen_fp8 else 0
        return torch.frombuffer(bytearray(self._seen_fp8.to_bytes(8, "big")), dtype=torch.uint8)[
            :size
        ]

    def set_extra_state(self, state: Any) -> None:
        self._seen_fp8 = int.from_bytes(bytes(state.tolist()), "big")


class LayerNormLinear(Linear):
    """RMS norm and then a column parallel layer."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float,
        normalization: str,
        zero_centered_gamma: bool,
        return_layernorm_output: bool,
        params_dtype: torch.dtype,
        device: Any,
        sequence_parallel: bool,
        **linear: Any,
    ) -> None:
        assert normalization == "RMSNorm"
        assert not zero_centered_gamma
        assert not return_layernorm_output
        super().__init__(
            in_features, out_features, params_dtype=params_dtype, device=device,
            sequence_parallel=sequence_parallel, **linear,
        )  # fmt: skip
        self.eps = eps
        made = torch.ones(in_features, dtype=params_dtype, device=device)
        self.layer_norm_weight = torch.nn.Parameter(made)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # pyright: ignore

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        x = functional.rms_norm(inp, (self.in_features,), self.layer_norm_weight, self.eps)
        return self._product(x, is_first_microbatch)


class GroupedLinear(torch.nn.Module):
    """A linear layer for each group of rows. Megatron moves the rows, so no rank's are gathered."""

    fp8 = fp8_calibration = False

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        get_rng_state_tracker: Any,
        rng_tracker_name: str | None = None,
        init_method: Callable[[torch.Tensor], Any] | None,
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        params_dtype: torch.dtype,
        device: Any,
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        assert not fuse_wgrad_accumulation
        assert not bias
        assert tp_size == 1
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8_meta = {"fp8_checkpoint": False}
        for i in range(num_gemms):
            weight = torch.full(
                (out_features, in_features), torch.nan, dtype=params_dtype, device=device
            )
            self.register_parameter(f"weight{i}", torch.nn.Parameter(weight))

    def forward(
        self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> torch.Tensor:
        groups = inp.split(m_splits)
        weights = [self.get_parameter(f"weight{i}") for i in range(self.num_gemms)]
        return torch.cat([functional.linear(x, w) for x, w in zip(groups, weights, strict=True)])

    def init_fp8_metadata(self, num_gemms: int) -> None:
        pass

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state.numel() == 0


class DotProductAttention(torch.nn.Module):
    """Megatron subclasses it."""
