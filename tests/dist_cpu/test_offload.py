"""What waits in host memory, or is given back, changes no bit of the training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from harness import rows_of, run_ranks, tiny_hf
from live_bytes import existing_storages
from megatron.core.optimizer.optimizer import MegatronOptimizer
from test_policy_parity import LOSS, groups_of, make_policy

from megatron_qlrl.policy import offload
from megatron_qlrl.types import PackedRow
from megatron_qlrl.weights.checkpoint import CheckpointStore, load_checkpoint

Settings = dict[str, Any]

# Layout and settings, and what is compared with the plain run of the same. In float32 and without
# a GPU the optimizer's calls must move nothing: its weights are the model's own.
CASES: list[tuple[Settings, list[str]]] = [
    (
        {"dtype": torch.bfloat16, "distributed_optimizer": True},
        ["gradients", "optimizer", "saved", "moments"],
    ),
    ({"dtype": torch.bfloat16}, ["optimizer", "saved", "moments"]),
    ({"layout": (1, 2, 1), "recompute": "full"}, ["gradients", "activations"]),
    ({"layout": (2, 1, 1), "recompute": "full"}, ["activations"]),
]


def test_training_is_bitwise_the_same(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "hf", "qwen2", tie_word_embeddings=True)
    cases = [
        (folder, settings, what, tmp_path / f"case_{number}")
        for number, (settings, others) in enumerate(CASES)
        for what in ("plain", *others)
    ]
    run_ranks(check_case, 2, cases)


def check_case(rank: int, case: tuple[Path, Settings, str, Path]) -> None:
    folder, settings, what, out = case
    memory = another_memory(spoil=what == "optimizer")
    with memory if what in ("optimizer", "saved") else nullcontext():
        found = train(folder, dict(settings), what, out)
    file = out / f"rank_{rank}.pt"
    if what == "plain":
        assert any(t.any() for t in found)
        out.mkdir(exist_ok=True)
        torch.save(found, file)
    else:
        expected = torch.load(file, weights_only=True)
        assert all(map(torch.equal, found, expected)), (settings, what)


def train(folder: Path, settings: Settings, what: str, out: Path) -> list[torch.Tensor]:
    """An update, log-probs, a refused update, another update: weights and last gradients."""
    policy, context = make_policy(
        folder,
        settings.pop("layout", (1, 1, 1)),
        offload_optimizer=what in ("optimizer", "saved", "activations"),
        offload_activations=what == "activations",
        **settings,
    )
    rows = rows_of(groups_of(policy.model_shape.vocab_size), context)
    if what == "moments":
        make_moments_twice(policy, rows)
    update_watched(policy, rows, moved=what == "activations")
    if what == "gradients":
        free_twice(policy)
    rows = policy.add_logprobs(rows, "old_logprobs")
    policy.update(rows, LOSS, lr=1e-3, permit=lambda metrics: False)
    if what == "saved":
        save_and_load(policy, rows, out / "checkpoints")
    policy.update(rows, LOSS, lr=1e-3)
    assert policy.version == 3 if what == "saved" else 2
    parameters = list(policy.model.parameters())
    return [t.detach().clone() for p in parameters for t in (p, p.main_grad)]


def free_twice(policy: Any) -> None:
    """As for two generations in a row."""
    before = sum(s.nbytes() for s in existing_storages())
    policy.free_gradients()
    policy.free_gradients()
    numel = sum(buffer.grad_data.numel() for buffer in policy.ddp_model.buffers)
    assert numel >= sum(p.numel() for p in policy.model.parameters())
    assert before - sum(s.nbytes() for s in existing_storages()) == 4 * numel


def make_moments_twice(policy: Any, rows: Sequence[PackedRow]) -> None:
    """A fresh optimizer has its moments before the first update, which makes no other ones, and has
    none of an update before it."""
    before = [p.detach().clone() for p in policy.model.parameters()]
    policy.fresh_moments()
    there = {s._cdata for s in moments(policy)}
    policy.update(rows, LOSS, lr=1e-3)
    assert there == {s._cdata for s in moments(policy)}
    with torch.no_grad():
        for parameter, value in zip(policy.model.parameters(), before, strict=True):
            parameter.copy_(value)
    policy.optimizer.reload_model_params()
    policy.fresh_moments()
    policy.version = 0


def moments(policy: Any) -> list[torch.UntypedStorage]:
    (part,) = policy.optimizer.chained_optimizers
    states = part.optimizer.state.values()
    assert len(states) == sum(len(group["params"]) for group in part.optimizer.param_groups) > 0
    return [state[name].untyped_storage() for state in states for name in ("exp_avg", "exp_avg_sq")]


def update_watched(policy: Any, rows: Sequence[PackedRow], *, moved: bool) -> None:
    """An update; every layer's input goes to host memory, in pieces, or none."""
    inputs, to_host = 0, offload._to_host

    def counted(hidden_size: int, tensor: torch.Tensor) -> Any:
        nonlocal inputs
        kept = to_host(hidden_size, tensor)
        if not isinstance(kept, torch.Tensor):
            inputs += 1
            assert [p.nbytes for p in kept[0]][:-1] == offload.pieces(tensor.nbytes)[:-1]
            assert len(kept[0]) > 1
        return kept

    with (
        patch.object(offload, "_to_host", counted),
        patch.object(offload, "SMALLEST_BYTES", 64),
    ):
        policy.update(rows, LOSS, lr=1e-3)
    layers = policy.model_shape.num_layers // policy.context.pp.size
    assert inputs >= layers * len(rows) if moved else inputs == 0


def save_and_load(policy: Any, rows: Sequence[PackedRow], out: Path) -> None:
    """A checkpoint from what waits in host memory, and back into it after one more update."""
    store = CheckpointStore(out, keep=1, warn=print)
    store.save(1, model=policy.model, optimizer=policy.optimizer, state={})
    store.wait()
    policy.update(rows, LOSS, lr=1e-3)
    path = store.newest()
    store.close()
    assert path is not None
    with policy.optimizer_at_hand():
        load_checkpoint(path, model=policy.model, optimizer=policy.optimizer)


@contextmanager
def another_memory(*, spoil: bool) -> Iterator[None]:
    """Stands in for host memory: what is there lies in other storages and, with `spoil`, is NaN to
    whoever reads it before it is back."""
    away: dict[int, list[torch.Tensor]] = {}

    def state(part: Any) -> list[torch.Tensor]:
        inner = part.optimizer
        weights = [p for group in inner.param_groups for p in group["params"]]
        return weights + [v for s in inner.state.values() for v in s.values()]

    def offload(part: Any) -> None:
        assert id(part) not in away, "offloaded twice"
        away[id(part)] = [t.data for t in state(part)]
        for tensor in state(part):
            tensor.data = torch.full_like(tensor, torch.nan) if spoil else tensor.data.clone()

    def restore(part: Any) -> None:
        for tensor, value in zip(state(part), away.pop(id(part)), strict=True):
            tensor.data = value if spoil else tensor.data.clone()

    with (
        patch.object(MegatronOptimizer, "offload_to_cpu", offload),
        patch.object(MegatronOptimizer, "restore_from_cpu", restore),
    ):
        yield
    assert away, "it does not end in host memory"
