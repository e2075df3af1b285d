"""Checks a command once, runs it in this process or in ranks of its own, and shows its errors."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_qlrl.errors import ConfigError, QlrlError
from megatron_qlrl.launch import local
from megatron_qlrl.platform.env import Ranks, read_ranks
from megatron_qlrl.platform.megatron_version import check_megatron
from megatron_qlrl.platform.stop import interrupt_ends


def on_ranks(
    argv: list[str],
    processes: int,
    *,
    check: Callable[[int], None],
    run: Callable[[], None],
    saves: bool = False,
) -> None:
    """Checks megatron-core's version and calls `check`, both once, then `run`: in this process if
    it is a rank already or the only one, or else in `processes` new ranks.

    Args:
        argv: the command line that the new ranks run.
        check: gets the number of ranks.
        saves: whether the command saves when it is asked to stop.
    """
    interrupt_ends()  # an interrupted command removes what it had begun to write
    ranks = read_ranks()
    world_size = ranks.world_size if ranks.world_size > 1 else processes
    if not local.is_child():
        with shown_once():
            check_megatron()  # before it is loaded: another version may not load at all
            check(world_size)
    if ranks.world_size == 1 and processes > 1:
        sys.exit(local.launch(argv, processes=processes, saves=saves))
    run()


@contextmanager
def shown_once() -> Iterator[None]:
    """Shows an error on one rank per machine and ends the others silently: for checks that fail
    alike on every rank of torchrun or srun."""
    try:
        yield
    except QlrlError as error:
        if read_ranks().local_rank == 0:
            show(error)
        sys.exit(2)


def show(error: QlrlError) -> None:
    """Writes one message to stderr; the launcher does so if it started this rank."""
    try:
        rank = read_ranks().rank
    except ConfigError:
        rank = Ranks().rank
    if local.report_error(str(error), rank):
        return
    if rank and str(error).startswith("rank "):
        return  # all ranks have agreed on this message, and rank 0 shows it
    for line in local.format_errors({rank: str(error)}):
        print(f"qlrl: error: {line}", file=sys.stderr, flush=True)
