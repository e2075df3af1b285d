import subprocess
import sys
import time
from pathlib import Path

from megatron_qlrl.platform.watchdog import watch_steps

PROGRAM = """
import sys, time
from pathlib import Path
from megatron_qlrl.platform import watchdog

def hang_here():
    time.sleep(60)

def steps():
    for number in range(3):
        if number == int(sys.argv[2]):
            hang_here()
        yield number

watchdog.GRACE_S = 0.2
for number in watchdog.watch_steps(steps(), stacks=Path(sys.argv[1]), floor_s=0.5):
    print("step", number, flush=True)
    if number == int(sys.argv[3]):
        hang_here()
"""
NEVER = "9"


def run(
    stacks: Path, *, step: str = NEVER, caller: str = NEVER
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(stacks), step, caller]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


def test_hung_step_leaves_stacks_and_ends(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks" / "rank_3.txt"
    done = run(stacks, step="2")
    assert (done.returncode, done.stdout) == (1, "step 0\nstep 1\n")
    assert "no step has ended for 0 s" in done.stderr and "run.hang_after_s" in done.stderr
    assert "hang_here" in stacks.read_text()


def test_hung_work_with_a_step_ends_too(tmp_path: Path) -> None:
    stacks = tmp_path / "rank_0.txt"
    done = run(stacks, caller="0")
    assert (done.returncode, done.stdout) == (1, "step 0\n")
    assert "hang_here" in stacks.read_text()


def test_steps_in_time_pass_and_nothing_is_left_running(tmp_path: Path) -> None:
    stacks = tmp_path / "rank_0.txt"
    assert list(watch_steps(iter([1, 2, 3]), stacks=stacks, floor_s=0.3)) == [1, 2, 3]
    time.sleep(0.6)  # had a timer been left, this process would have ended
    done = run(stacks)
    assert (done.returncode, done.stdout) == (0, "step 0\nstep 1\nstep 2\n")
    assert not stacks.exists()


def test_slow_steps_raise_the_limit(tmp_path: Path) -> None:
    def steps():
        for seconds in (0.1, 0.4, 0.4):  # all under ten times the first, above the floor
            time.sleep(seconds)
            yield seconds

    watched = watch_steps(steps(), stacks=tmp_path / "rank_0.txt", floor_s=0.3)
    assert list(watched) == [0.1, 0.4, 0.4]


PEERS = """
import os, signal, sys
from pathlib import Path
import torch
from megatron_qlrl.parallel.context import process_group
from megatron_qlrl.platform import watchdog

watchdog.GRACE_S = 0.2
folder, rank = Path(sys.argv[1]), int(sys.argv[2])

def steps():
    for number in range(3):
        if (rank, number) == (1, 2):
            os.kill(os.getpid(), signal.SIGSTOP)
        torch.distributed.all_reduce(torch.ones(1))
        yield number

meeting = f"file://{folder}/meeting"
with process_group(rank=rank, local_rank=rank, world_size=2, init_method=meeting):
    stacks = folder / "stacks" / f"rank_{rank}.txt"
    for number in watchdog.watch_steps(steps(), stacks=stacks, floor_s=3.0):
        print("step", number, flush=True)
"""


def test_rank_that_waits_for_a_frozen_one_says_where(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PEERS, str(tmp_path), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        out, err = ranks[0].communicate(timeout=120)
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert (ranks[0].returncode, out) == (1, "step 0\nstep 1\n"), err
    assert "taken for hung" in err
    stacks = {file.name: file.read_text() for file in (tmp_path / "stacks").iterdir()}
    assert list(stacks) == ["rank_0.txt"]
    assert "all_reduce" in stacks["rank_0.txt"]
