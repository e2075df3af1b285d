"""Gives a job its process group, and the lock that keeps other jobs out of its folder."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from megatron_qlrl.parallel.collectives import on_all_ranks
from megatron_qlrl.parallel.context import process_group
from megatron_qlrl.platform.env import init_ranks
from megatron_qlrl.platform.lock import Lock, take_lock


@contextmanager
def job_on(run_dir: Path) -> Iterator[ExitStack]:
    """Joins the job's process group, which has run.dir to itself: rank 0 holds the lock until the
    end. The yielded stack releases the lock; call its `pop_all` to leave the lock to the program
    that replaces this process.

    Raises:
        ConfigError: another run holds the lock (every rank).
    """
    ranks = init_ranks()

    def lock() -> list[Lock]:
        if ranks.rank:
            return []
        return [take_lock(run_dir / "run.lock", what=f"run.dir {run_dir}")]

    with (
        process_group(rank=ranks.rank, local_rank=ranks.local_rank, world_size=ranks.world_size),
        ExitStack() as held,
    ):
        for taken in on_all_ranks(lock):
            held.enter_context(closing(taken))
        yield held
