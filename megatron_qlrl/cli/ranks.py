"""Where a command runs: checked once, then here or in ranks of its own; errors in one place."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_qlrl.errors import ConfigError, QlrlError
from megatron_qlrl.launch import local
from megatron_qlrl.platform.env import Ranks, read_ranks
from megatron_qlrl.platform.stop import interrupt_ends


def on_ranks(
    argv: list[str],
    processes: int,
    *,
    check: Callable[[int], None],
    run: Callable[[], None],
    saves: bool = False,
) -> None:
    """Checks once, then runs here (already a rank, or a job of one) or in `processes` ranks.

    `saves`: the command saves when it is asked to stop."""
    interrupt_ends()  # other commands take away what they had begun to write
    ranks = read_ranks()
    world_size = ranks.world_size if ranks.world_size > 1 else processes
    if not local.is_child():
        with shown_once():
            check(world_size)
    if ranks.world_size == 1 and processes > 1:
        sys.exit(local.launch(argv, processes=processes, saves=saves))
    run()


@contextmanager
def shown_once() -> Iterator[None]:
    """For checks that fail alike on every rank of torchrun or srun: one a machine says so."""
    try:
        yield
    except QlrlError as error:
        if read_ranks().local_rank == 0:
            show(error)
        sys.exit(2)


def show(error: QlrlError) -> None:
    """One message on stderr, by the launcher when it started this rank."""
    try:
        rank = read_ranks().rank
    except ConfigError:
        rank = Ranks().rank
    if local.report_error(str(error), rank):
        return
    if rank and str(error).startswith("rank "):
        return  # agreed between the ranks: rank 0 shows it
    for line in local.format_errors({rank: str(error)}):
        print(f"qlrl: error: {line}", file=sys.stderr, flush=True)
