"""The policy: model, optimizer and the one call into Megatron's schedule.

Loss scaling is here and nowhere else. The loss function returns (weighted sum, 0 tokens, data)
with `calculate_per_token_loss`: Megatron then divides by nothing, DDP sums over data and
context parallel ranks, and the gradient is that of the sum over all tokens of the batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_qlrl.config.schema import OptimizerConfig, PolicyConfig
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.errors import DataError
from megatron_qlrl.parallel.collectives import gather_objects
from megatron_qlrl.parallel.context import ParallelContext
from megatron_qlrl.platform.device import device
from megatron_qlrl.platform.megatron_cpu import megatron_device
from megatron_qlrl.policy.attention import AttentionPlan
from megatron_qlrl.policy.experts import expert_balance, forget_counts
from megatron_qlrl.policy.logprobs import token_logprobs
from megatron_qlrl.policy.model import build_model
from megatron_qlrl.policy.optimizer import (
    apply_settings,
    build_optimizer,
    clip_and_step,
    fresh_moments,
    wrap_data_parallel,
)
from megatron_qlrl.types import Block, MicroBatch, PackedRow

# (log-probs, entropy, columns), all [M] -> (weighted sum, sums for the metrics)
Loss = Callable[
    [torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]],
    tuple[torch.Tensor, dict[str, torch.Tensor]],
]
# How a packed row becomes this rank's micro-batch (packing/shard.py).
Shard = Callable[[PackedRow], MicroBatch]
# Whether an update with these metrics may be taken.
Permit = Callable[[Mapping[str, float]], bool]


def finite_gradient(metrics: Mapping[str, float]) -> bool:
    return isfinite(metrics["actor/grad_norm"])


class Policy:
    """One rank's part of the trained model.

    Attributes:
        version: optimizer updates so far; every rollout carries the version it came from.
    """

    def __init__(
        self,
        model_shape: ModelShape,
        *,
        config: PolicyConfig,
        optimizer_config: OptimizerConfig,
        dtype: torch.dtype,
        temperature: float,
        context: ParallelContext,
        shard: Shard,
        load: Callable[[torch.nn.Module], None],
    ) -> None:
        """`load` fills the fresh model's weights, before the optimizer copies them. The layout is
        that of `context`."""
        self.context, self.model_shape = context, model_shape
        self.temperature = temperature
        self.version = 0
        self.shard = shard
        self._reference: list[torch.Tensor] | None = None
        self._optimizer_config = optimizer_config
        with megatron_device():
            model = build_model(model_shape, config, dtype=dtype, context=context)
            self.model = model.to(device())
            load(self.model)
            self.ddp_model = wrap_data_parallel(
                self.model,
                distributed_optimizer=config.distributed_optimizer,
                overlap_grad_reduce=config.overlap_grad_reduce,
            )
            self.optimizer = build_optimizer(
                self.ddp_model, optimizer_config, distributed=config.distributed_optimizer
            )
            if optimizer_config.offload:
                self.optimizer.offload_to_cpu()
        self.model.config.finalize_model_grads_func = finalize_model_grads

    def update(
        self, rows: Sequence[PackedRow], loss: Loss, *, lr: float, permit: Permit = finite_gradient
    ) -> dict[str, float]:
        """Takes one optimizer step on this data-parallel rank's rows; metrics agree on all ranks.

        Unless `permit` says yes to the metrics on every rank, the step is not taken: weights,
        optimizer state and version stay as they are, bitwise.

        Returns per-token means over the whole batch, `actor/grad_norm`, `actor/lr`, and the balance
        of a model's experts.
        """
        self.ddp_model.train()
        with megatron_device():
            self.clear_gradients()
            forget_counts(self.model)
            sums = self.run(rows, partial(training_loss, loss), forward_only=False)
            with self.optimizer_at_hand():  # a gradient lies on its weight's device
                self.optimizer.prepare_grads()
                norm = self.optimizer.get_grad_norm()
                metrics = token_means(sums, self.context)
                metrics |= {"actor/grad_norm": float(norm), "actor/lr": lr}
                metrics |= expert_balance(self.model)
                if all(gather_objects(permit(metrics))):
                    apply_settings(self.optimizer, self._optimizer_config, rate=lr)
                    clip_and_step(self.optimizer, norm, max_norm=self._optimizer_config.clip_grad)
                    self.version += 1
        return metrics

    def clear_gradients(self) -> None:
        """Sets the gradients to 0 and takes their memory again if `free_gradients` gave it back.
        Call it inside `megatron_device()`."""
        self.ddp_model.restore_grad_buffers()
        self.ddp_model.zero_grad_buffer()
        # Without this the first micro-batch's gradients count twice from step two on.
        self.optimizer.zero_grad()

    def free_gradients(self) -> None:
        """Gives the gradients' memory back until the next update, because between updates they hold
        nothing."""
        with megatron_device():
            self.ddp_model.offload_grad_buffers()

    @contextmanager
    def optimizer_at_hand(self) -> Iterator[None]:
        """A block in which the optimizer's state is on the device; with optimizer.offload it is in
        host memory outside. Without a GPU the same calls move nothing. Not run on a GPU yet."""
        with megatron_device():
            if self._optimizer_config.offload:
                self.optimizer.restore_from_cpu()
            yield
            if self._optimizer_config.offload:
                self.optimizer.offload_to_cpu()

    def fresh_moments(self) -> None:
        """Gives the optimizer moments that are 0, and their memory: what trains calls it before an
        engine starts. Call it inside `optimizer_at_hand`."""
        fresh_moments(self.optimizer)

    @torch.no_grad()
    def add_logprobs(self, rows: Sequence[PackedRow], name: str) -> list[PackedRow]:
        """Returns `rows` with the column `name`: the log-probs of their response tokens under the
        present weights, without gradient.

        Where the rows have such a column already, its numbers stay and only NaN is filled in:
        groups that waited for a later step keep the log-probs of the weights that sampled them.
        """
        self.ddp_model.eval()
        with megatron_device():
            outputs = self.run(rows, _collect_logprobs, forward_only=True)
        lengths = [row.num_response_tokens for row in rows]
        flat = torch.zeros(sum(lengths), dtype=torch.float32, device=device())
        starts = np.cumsum([0, *lengths])
        for start, part in zip(starts, outputs, strict=False):  # nothing before the last stage
            flat[start + part["slots"]] = part["logprobs"].float()
        # Each context parallel rank filled its own slots, earlier stages none.
        dist.all_reduce(flat, group=self.context.cp.group)
        dist.all_reduce(flat, group=self.context.pp.group)
        values = np.split(flat.cpu().numpy(), starts[1:-1])
        return [_fill_column(row, name, value) for row, value in zip(rows, values, strict=True)]

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """A block in which log-probs are taken at `temperature`."""
        own, self.temperature = self.temperature, temperature
        try:
            yield
        finally:
            self.temperature = own

    def keep_reference(self) -> None:
        """Keeps a copy of the present weights as the reference policy (in host memory)."""
        self._reference = [p.detach().cpu().clone() for p in self.model.parameters()]

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """A block in which the model has the reference weights; after it, its own again,
        bitwise."""
        assert self._reference is not None, "keep_reference() was not called"
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        assert self._reference is not None
        for parameter, other in zip(self.model.parameters(), self._reference, strict=True):
            mine = parameter.detach().cpu().clone()
            parameter.data.copy_(other)
            other.copy_(mine)

    def run(self, rows: Sequence[PackedRow], finish: Any, *, forward_only: bool) -> list[Any]:
        """Runs Megatron's schedule over `rows` and returns the last stage's results. `finish`
        (micro-batch, log-probs, entropy) makes them. Call it inside `megatron_device()`.

        Raises:
            DataError: (on this rank) a token id that the model does not have.
        """
        for row in rows:
            check_token_ids(row.token_ids, self.model_shape.vocab_size)
        idle = self._idle_passes(len(rows))
        batches = [self.shard(row) for row in (*rows, *(_idle(rows[0]) for _ in range(idle)))]
        results = get_forward_backward_func()(
            forward_step_func=partial(self._forward, finish),
            data_iterator=iter(batches),
            model=[self.ddp_model],
            num_microbatches=len(batches),
            seq_length=1,  # unused: lengths vary and travel with the tensors
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return results[: len(rows)]

    def _idle_passes(self, num_rows: int) -> int:
        """Returns how many micro-batches without responses must follow this rank's rows, because
        ranks that share experts exchange tokens in each layer of each micro-batch."""
        if not self.context.experts_span_rows:
            return 0
        most = torch.tensor(num_rows, device=device())
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.context.dp.group)
        return int(most) - num_rows

    def _forward(self, finish: Any, batches: Iterator[MicroBatch], model: Any) -> Any:
        batch = next(batches)
        where = device()
        plan = AttentionPlan(
            qkv_format="segments",
            pieces=batch.pieces,
            kv_index=None if batch.kv_index is None else torch.from_numpy(batch.kv_index).to(where),
        )
        states = model(
            torch.from_numpy(batch.token_ids)[None].to(where),
            torch.from_numpy(batch.position_ids)[None].to(where),
            plan,
        )
        return states, partial(self._last_stage, finish, batch)

    def _last_stage(self, finish: Any, batch: MicroBatch, states: torch.Tensor) -> Any:
        where = states.device
        logprobs, entropy = token_logprobs(
            self.model.predicting_states(states, torch.from_numpy(batch.hidden_index).to(where)),
            self.model.output_weight(),
            torch.from_numpy(batch.target_ids).to(where),
            temperature=self.temperature,
            vocab_size=self.model_shape.vocab_size,
            tp_group=self.context.tp.group,
        )
        return finish(batch, logprobs, entropy)


def _idle(row: PackedRow) -> PackedRow:
    """Returns a row of one token and no response, with the columns of `row`."""
    one = np.zeros(1, np.int32)
    block = Block(group=-1, samples=(), prompt=(0, 1), responses=())
    columns = {name: values[:0] for name, values in row.columns.items()}
    return PackedRow(one, one, (block,), columns)


def check_token_ids(token_ids: np.ndarray, vocab_size: int) -> None:
    """Checks ids in host memory, where it costs nothing. On the device an id beyond the vocabulary
    would meet padding or no shard, and its log-prob would be a wrong number.

    Raises:
        DataError: an id is beyond the vocabulary.
    """
    wrong = token_ids[(token_ids < 0) | (token_ids >= vocab_size)]
    if wrong.size:
        raise DataError(
            f"token id {wrong[0]} is outside the model's vocabulary of {vocab_size}; the tokenizer "
            "that made it is another model's: put the model's own tokenizer files into model.path"
        )


def training_loss(
    loss: Loss, batch: MicroBatch, logprobs: torch.Tensor, entropy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Returns what the schedule wants of the last stage: (weighted sum, 0 tokens to divide by,
    sums)."""
    columns = {
        name: torch.from_numpy(values).to(logprobs.device) for name, values in batch.columns.items()
    }
    columns["responses"] = torch.from_numpy(batch.responses).to(logprobs.device)
    columns["num_responses"] = torch.tensor(batch.num_responses)  # stays in host memory
    total, sums = loss(logprobs, entropy, columns)
    num_tokens = torch.tensor(len(logprobs))
    return total, torch.zeros((), dtype=torch.int), sums | {"num_tokens": num_tokens}


def _fill_column(row: PackedRow, name: str, values: np.ndarray) -> PackedRow:
    """Returns the row with `values` in its column `name` where that has no number yet."""
    if name in row.columns:
        known = row.columns[name]
        values = np.where(np.isnan(known), values, known)
    return replace(row, columns={**row.columns, name: values})


def _collect_logprobs(
    batch: MicroBatch, logprobs: torch.Tensor, entropy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    slots = torch.from_numpy(batch.slots).to(logprobs.device)
    return logprobs.sum(), torch.zeros((), dtype=torch.int), {"logprobs": logprobs, "slots": slots}


WEIGHTED = ("actor/pg_loss", "actor/response_entropy")


def token_means(
    sums: Sequence[Mapping[str, torch.Tensor]], context: ParallelContext
) -> dict[str, float]:
    """Makes per-token means over the whole batch, the same on every rank, of the sums that each
    micro-batch of this rank returned.

    Names ending in `_max` are maxima; those in `WEIGHTED` are weighted sums already.
    """
    # Tensor parallel ranks hold copies, stages before the last hold nothing.
    counts = context.is_last_stage and context.tp.rank == 0
    mine = [{k: float(v) for k, v in part.items()} for part in sums] if counts else []
    parts = [part for rank in gather_objects(mine) for part in rank]
    num_tokens = sum(part["num_tokens"] for part in parts)
    means = {}
    for name in sorted({name for part in parts for name in part}):
        values = [part[name] for part in parts if name in part]
        if name.endswith("_max"):
            means[name] = max(values)
        elif name in WEIGHTED:
            means[name] = sum(values)
        elif name != "num_tokens":
            means[name] = sum(values) / max(num_tokens, 1)
    return means
