"""A checkpoint restores weights, optimizer and the next step, also under other layouts; a failed
save is every rank's failure and leaves the last checkpoint good."""

import errno
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import rows_of, run_ranks, tiny_hf
from megatron.core.dist_checkpointing.dict_utils import nested_values
from test_policy_parity import LOSS, groups_of, make_policy

from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.platform.megatron_cpu import megatron_device
from megatron_qlrl.weights import checkpoint, megatron_format
from megatron_qlrl.weights.checkpoint import CheckpointStore, load_checkpoint, load_weights
from megatron_qlrl.weights.checkpoint_folder import FORMAT, torn
from megatron_qlrl.weights.megatron_format import Snapshot
from megatron_qlrl.weights.stream import WeightStream
from tests.parity import Reference, pooled

Layout = tuple[int, int, int]


def train(policy: Any, context: Any, steps: int, **packing: Any) -> list[float]:
    rows = rows_of(groups_of(policy.model_shape.vocab_size), context, **packing)
    return [policy.update(rows, LOSS, lr=1e-3)["actor/grad_norm"] for _ in range(steps)]


def weights(policy: Any, context: Any) -> dict[str, torch.Tensor]:
    stream = WeightStream(
        policy.model, shape=policy.model_shape, context=context, bucket_bytes=10**6
    )
    return {name: tensor.clone() for name, tensor in stream}


@contextmanager
def writing_held() -> Iterator[threading.Event]:
    """Inside, the thread writes tensors only after the event."""
    held, write = threading.Event(), Snapshot.write_tensors

    def wait_and_write(*arguments: Any) -> None:
        held.wait()
        write(*arguments)

    with patch.object(Snapshot, "write_tensors", wait_and_write):
        yield held


def peer_case(rank: int, policy: Any, context: Any, steps: int, out: Path) -> None:
    """Trains as `save_case` does, in the last steps with rows that are packed otherwise, which says
    what rounding does here; the weights go to peer.pt."""
    train(policy, context, steps)
    train(policy, context, 2, share_prompts=False)
    after = weights(policy, context)
    if rank == 0:
        torch.save(after, out / "peer.pt")


def save_case(rank: int, policy: Any, context: Any, steps: int, out: Path) -> None:
    """Trains, saves, trains on; what followed the save goes to expected.pt."""
    train(policy, context, steps)
    store = CheckpointStore(out, keep=1, warn=print)
    saved = weights(policy, context)
    with writing_held() as held:
        state = {"step": steps}
        store.save(steps, model=policy.model, optimizer=policy.optimizer, state=state)
        state["step"] = -1  # like the weights, it changes before it is written
        norms = train(policy, context, 2)
        held.set()
        store.wait()
    expected = {"norms": norms, "saved": saved, "weights": weights(policy, context)}
    if rank == 0:
        torch.save(expected, out / "expected.pt")


def load_case(policy: Any, context: Any, out: Path, *, bitwise: bool) -> None:
    """Loads into a fresh policy and compares the weights, now and after two more updates: bitwise,
    or as near as the same updates come whose rows are packed otherwise (what rounding does)."""
    path = CheckpointStore(out, keep=1, warn=print).newest()
    assert path is not None and torn(path) is None
    state = load_checkpoint(path, model=policy.model, optimizer=policy.optimizer)
    assert state == {"format": FORMAT, "step": int(path.name[-8:])}
    expected = torch.load(out / "expected.pt", weights_only=True)
    for name, tensor in weights(policy, context).items():
        assert torch.equal(tensor, expected["saved"][name]), name
    norms = train(policy, context, 2)
    after = weights(policy, context)
    if bitwise:
        assert norms == expected["norms"]
        for name, tensor in after.items():
            assert torch.equal(tensor, expected["weights"][name]), name
    else:
        # A norm's own rounding is a hundred times smaller.
        assert norms == pytest.approx(expected["norms"], rel=1e-4)
        peer = torch.load(out / "peer.pt", weights_only=True)
        exact = {name: tensor.double() for name, tensor in expected["weights"].items()}
        Reference.of(pooled(exact, exact), pooled(peer, exact)).check(pooled(after, exact))


def check_case(rank: int, case: tuple[Any, ...]) -> None:
    action, layout, folder, distributed, out, *ep = case
    # A run may resume with another configured rate; the updates here are told theirs.
    settings: dict[str, Any] = {"configured_rate": 1e-3 if action[-1].isdigit() else 5e-4}
    settings |= {"ep": ep[0]} if ep else {}
    policy, context = make_policy(folder, layout, distributed_optimizer=distributed, **settings)
    if action.startswith("peer"):
        peer_case(rank, policy, context, int(action[-1]), out)
    elif action.startswith("save"):
        save_case(rank, policy, context, int(action[-1]), out)
    else:
        load_case(policy, context, out, bitwise=action == "same")


@pytest.mark.parametrize("distributed", [False, True])
def test_checkpoint_continues_bitwise_and_reshards(tmp_path: Path, distributed: bool) -> None:
    folder = tiny_hf(tmp_path / "hf", "qwen2")
    tp2, pp2, dp2 = (2, 1, 1), (1, 2, 1), (1, 1, 1)
    cases = {
        "from_tp2": [("peer2", tp2), ("save2", tp2), ("same", tp2), ("load", pp2), ("load", dp2)],
        # Here the distributed optimizer's moments are truly cut over the ranks.
        "from_dp2": [("peer2", dp2), ("save2", dp2), ("same", dp2), ("load", tp2)],
        "before_any_update": [("save0", dp2), ("same", dp2)],
    }
    for name in cases:
        (tmp_path / name).mkdir()
    run_ranks(
        check_case,
        2,
        [
            (action, layout, folder, distributed, tmp_path / name)
            for name, actions in cases.items()
            for action, layout in actions
        ],
    )


@pytest.mark.parametrize("distributed", [False, True])
def test_experts_continue_bitwise_and_reshard(tmp_path: Path, distributed: bool) -> None:
    """The experts have an optimizer of their own."""
    folder = tiny_hf(tmp_path / "hf", "qwen3_moe")
    one, tp2, pp2 = (1, 1, 1), (2, 1, 1), (1, 2, 1)
    # Layout and policy.ep.
    cases = [
        ("peer2", tp2, 2), ("save2", tp2, 2), ("same", tp2, 2),
        ("load", one, 1), ("load", one, 2), ("load", pp2, 1),
    ]  # fmt: skip
    run_ranks(
        check_case,
        2,
        [(action, layout, folder, distributed, tmp_path, ep) for action, layout, ep in cases],
    )


def test_tied_embedding_in_a_bucket_of_its_own(tmp_path: Path) -> None:
    """Under pipeline parallelism it has one, behind padding at these sizes."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    folder = tiny_hf(tmp_path / "hf", "qwen2", tie_word_embeddings=True, **sizes)
    pp2 = (1, 2, 1)
    cases = [("peer2", pp2), ("save2", pp2), ("same", pp2), ("load", (1, 1, 1))]
    run_ranks(check_case, 2, [(action, layout, folder, True, tmp_path) for action, layout in cases])


def check_shares(rank: int, folder: Path) -> None:
    """Of the optimizer's state a rank gathers, and reads, what it keeps itself, with the parameters
    of which it keeps a part whole."""
    policy, _ = make_policy(folder, (1, 1, 1), distributed_optimizer=True)
    sizes = [p.numel() for p in policy.model.parameters()]
    for is_loading in (False, True):
        with megatron_device():
            policy.fresh_moments()
            state = megatron_format._sharded_state(
                policy.model, policy.optimizer, is_loading=is_loading
            )
        mine = [t for t in nested_values(state["optimizer"]) if hasattr(t, "replica_id")]
        share = sum(t.data.numel() for t in mine)
        assert abs(share - 3 * sum(sizes) / 2) <= 3 * max(sizes)
        assert len(mine) < 3 * len(sizes)


def test_ranks_share_the_optimizers_state(tmp_path: Path) -> None:
    run_ranks(check_shares, 2, [tiny_hf(tmp_path / "hf", "qwen2", num_hidden_layers=4)])


@contextmanager
def writes_fail(after_bytes: int) -> Iterator[None]:
    """Every file this process writes ends at a size limit, a real error of the system's."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fake_free(num_bytes: int) -> AbstractContextManager[Any]:
    usage = type(shutil.disk_usage("/"))(10**15, 10**15 - num_bytes, num_bytes)
    return patch.object(shutil, "disk_usage", lambda _: usage)


def failures(rank: int) -> dict[str, AbstractContextManager[Any]]:
    """What makes a save fail, by a part of the message that all ranks must then give."""

    def only(chosen: int, failure: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
        return failure if rank == chosen else nullcontext()

    return {
        "disk full": only(0, fake_free(1000)),
        "rank 0: the checkpoint could not be written": only(
            0, patch.object(Snapshot, "write_common", no_space)
        ),
        "rank 1: ": only(1, writes_fail(after_bytes=20_000)),
        "No space left on device": only(0, patch.object(checkpoint, "_publish", no_space)),
        "rank 1: the checkpoint could not": only(
            1, patch.object(checkpoint, "digest_of", no_space)
        ),
    }


def check_failures(rank: int, case: tuple[Path, Path, Path | None]) -> None:
    folder, out, small_disk = case
    policy, _ = make_policy(folder, (2, 1, 1))
    mine = {"model": policy.model, "optimizer": policy.optimizer}
    store = CheckpointStore(out, keep=1, warn=print)
    with writing_held() as held:
        good = store.save(1, **mine, state={})
        assert not good.exists()  # the thread writes it
        held.set()
        store.wait()
    for message, failure in failures(rank).items():
        with failure, pytest.raises(CheckpointError, match=message):
            store.save(2, **mine, state={})
            while not store.failed():
                time.sleep(0.01)
            store.wait()
        dist.barrier()
        assert store.newest() == good
        assert [p.name for p in out.iterdir()] == ["step_00000001"], message
        dist.barrier()
    assert store.save(2, **mine, state={}) == store.newest()  # waits; the ranks are still in step

    if small_disk is not None:
        small = CheckpointStore(small_disk, keep=1, warn=print)
        with pytest.raises(CheckpointError, match="disk full: a checkpoint needs about 0.00 GB"):
            small.save(1, **mine, state={})
        with fake_free(10**12), pytest.raises(CheckpointError, match="could not be written"):
            small.save(1, **mine, state={})
            small.wait()
        dist.barrier()
        assert list(small_disk.iterdir()) == []


def check_refusals(rank: int, case: tuple[Path, Path, None]) -> None:
    """Another model than the one that was saved; then files that one rank cannot see."""
    folder, out, _ = case
    policy, _ = make_policy(folder, (1, 2, 1))
    mine = {"model": policy.model, "optimizer": policy.optimizer}
    path = out / "step_00000002"
    with pytest.raises(CheckpointError, match="does not fit this model: rank 0: .*shape"):
        load_checkpoint(path, **mine)
    with pytest.raises(CheckpointError, match="does not fit this model: rank 0: .*shape"):
        load_weights(path, model=policy.model)
    elsewhere = path if rank == 0 else out / "not_shared"
    with pytest.raises(CheckpointError, match="rank 1: checkpoint .*not_shared cannot be read"):
        load_checkpoint(elsewhere, **mine)


def check_failure_case(rank: int, case: tuple[str, Any]) -> None:
    {"failures": check_failures, "refusals": check_refusals}[case[0]](rank, case[1])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A disk of 256 KiB, a quarter of the checkpoint; None where we may not mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, check=False).returncode != 0:
        yield None
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_failure_is_every_ranks_and_the_last_checkpoint_stays(
    tmp_path: Path, small_disk: Path | None
) -> None:
    folder = tiny_hf(tmp_path / "hf", "qwen2")
    other = tiny_hf(tmp_path / "other", "qwen2", num_hidden_layers=4)
    out = tmp_path / "checkpoints"
    cases = [("failures", (folder, out, small_disk)), ("refusals", (other, out, None))]
    run_ranks(check_failure_case, 2, cases)
