"""The process group is left behind whatever happens inside."""

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_qlrl.parallel.context import init_parallel, process_group
from megatron_qlrl.platform.env import listen


def test_groups_of_a_single_rank(tmp_path: Path) -> None:
    method = f"file://{tmp_path}/store"
    with process_group(rank=0, local_rank=0, world_size=1, init_method=method):
        context = init_parallel(tp=1, pp=1, cp=1, seed=3)
        assert (context.rank, context.world_size, context.is_last_stage) == (0, 1, True)
        for axis in (context.tp, context.pp, context.cp, context.dp):
            assert (axis.size, axis.rank, axis.group.size()) == (1, 0, 1)
        with pytest.raises(AssertionError, match="exist already"):
            init_parallel(tp=1, pp=1, cp=1, seed=3)
    assert not dist.is_initialized()


def test_group_is_left_after_an_error_and_can_be_made_again(tmp_path: Path) -> None:
    for attempt in range(2):
        method = f"file://{tmp_path}/store{attempt}"
        with (
            pytest.raises(KeyError),
            process_group(rank=0, local_rank=0, world_size=1, init_method=method),
        ):
            init_parallel(tp=1, pp=1, cp=1, seed=3)
            raise KeyError
        assert not dist.is_initialized()


@pytest.mark.parametrize("host", ["", "127.0.0.1"])
def test_store_uses_the_socket_that_listens_already(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = listen(host)
    port = listener.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("QLRL_LISTENER", str(listener.detach()))
    with process_group(rank=0, local_rank=0, world_size=1):
        other = dist.TCPStore("127.0.0.1", port, is_master=False)
        other.set("key", "value")
        assert other.get("key") == b"value"
