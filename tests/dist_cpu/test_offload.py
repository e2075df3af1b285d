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

from megatron_qlrl.types import PackedRow
from megatron_qlrl.weights.checkpoint import CheckpointStore, load_checkpoint

Settings = dict[str, Any]

# Layout and settings, and what is compared with the plain run of the same. In float32 and without
# a GPU the optimizer's calls must move nothing: its weights are the model's own.
CASES: list[tuple[Settings, list[str]]] = [
    ({"dtype": torch.bfloat16, "distributed_optimizer": True}, ["gradients", "optimizer", "saved"]),
    ({"dtype": torch.bfloat16}, ["optimizer", "saved"]),
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


def update_watched(policy: Any, rows: Sequence[PackedRow], *, moved: bool) -> None:
    """An update; every layer's input is copied to host memory, or none."""
    copies = 0
    copy = torch.Tensor.copy_

    def counted(self: torch.Tensor, source: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
        nonlocal copies
        copies += self.dim() == 3 and self.shape[-1] == policy.model_shape.hidden_size
        return copy(self, source, *args, **kw)

    with patch.object(torch.Tensor, "copy_", counted):
        policy.update(rows, LOSS, lr=1e-3)
    layers = policy.model_shape.num_layers // policy.context.pp.size
    assert copies >= layers * len(rows) if moved else copies == 0


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
