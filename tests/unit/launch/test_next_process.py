"""A process that replaces itself, seen from outside."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, signal, sys
from megatron_qlrl.launch.next_process import replace_process
from megatron_qlrl.platform.env import longest_step_s
from megatron_qlrl.platform.stop import StopSignals

print(os.getpid(), sys.argv[1:], os.environ["MASTER_PORT"], os.environ["RANK"],
      longest_step_s(), os.environ.get("TORCHELASTIC_USE_AGENT_STORE"))
if os.environ["MASTER_PORT"] < "1003":
    left_open = os.open(sys.argv[0], os.O_RDONLY)
    os.set_inheritable(left_open, True)
    listener = os.open(sys.argv[0], os.O_RDONLY) if os.environ["MASTER_PORT"] == "1002" else None
    replace_process(int(os.environ["MASTER_PORT"]) + 1, listener=listener,
                longest_step_s=longest_step_s() + 1.5,
                settings=["x.y=true"])
os.kill(os.getpid(), signal.SIGUSR1)  # before the program listens
with StopSignals(None) as stop:
    print(stop.between_steps(1))
print(len(os.listdir("/proc/self/fd")))
print(os.path.samestat(os.fstat(int(os.environ["QLRL_LISTENER"])), os.stat(sys.argv[0])))
"""


def test_same_process_same_command_other_port(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), "rl", "c.yaml"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[3],
        env={
            "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
            "MASTER_PORT": "1001",
            "RANK": "1",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        },
    )
    first, second, third, stop, descriptors, is_listener_open = done.stdout.splitlines()
    pid = first.split()[0]
    assert first == f"{pid} ['rl', 'c.yaml'] 1001 1 0.0 True"
    assert second == f"{pid} ['rl', 'c.yaml', 'x.y=true'] 1002 1 1.5 None"
    assert third == f"{pid} ['rl', 'c.yaml', 'x.y=true'] 1003 1 3.0 None"
    assert stop == "asked to stop"
    assert descriptors == "5"  # stdin, stdout, stderr, the listener and the listing itself
    assert is_listener_open == "True"
