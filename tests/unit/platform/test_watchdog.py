import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = """
import json, sys, time
from pathlib import Path
from megatron_qlrl.platform import watchdog

def pause_here(seconds):
    time.sleep(seconds)

def steps(pauses):
    for number, seconds in enumerate(pauses):
        pause_here(seconds)
        yield number

watchdog.GRACE_S = 0.2
stacks, in_step, in_caller = sys.argv[1:]
for number in watchdog.watch_steps(steps(json.loads(in_step)), stacks=Path(stacks), floor_s=2.0):
    print("step", number, flush=True)
    pause_here(json.loads(in_caller)[number])
pause_here(2.5)  # a timer that was left running would end the program
print("done")
"""


def run(stacks: Path, *, steps: list[float], caller: list[float]) -> Any:
    """The program with pauses of so many seconds, under a floor of 2."""
    command = [sys.executable, "-c", PROGRAM, str(stacks), str(steps), str(caller)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


def test_hung_step_leaves_stacks_and_ends(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks" / "rank_3.txt"
    done = run(stacks, steps=[0, 0, 40], caller=[0, 0, 0])
    assert (done.returncode, done.stdout) == (1, "step 0\nstep 1\n")
    assert "no step has ended for 2 s" in done.stderr and "run.hang_after_s" in done.stderr
    assert "pause_here" in stacks.read_text()


def test_hung_work_with_a_step_ends_too(tmp_path: Path) -> None:
    stacks = tmp_path / "rank_0.txt"
    done = run(stacks, steps=[0, 0, 0], caller=[40, 0, 0])
    assert (done.returncode, done.stdout) == (1, "step 0\n")
    assert "pause_here" in stacks.read_text()


def test_slow_steps_raise_the_limit_and_no_timer_is_left(tmp_path: Path) -> None:
    stacks = tmp_path / "rank_0.txt"
    # Half a second with the caller's work: from then on five seconds are in time.
    done = run(stacks, steps=[0.25, 2.5], caller=[0.25, 0])
    assert (done.returncode, done.stdout) == (0, "step 0\nstep 1\ndone\n"), done.stderr
    assert not stacks.exists()


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
