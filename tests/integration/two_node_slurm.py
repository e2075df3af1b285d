"""A real Slurm of two nodes on this machine: munged, slurmctld, two slurmds, in a folder of their
own. The nodes' names are two that mean this machine: the ranks meet at the first one's.

Debian's packages slurm-wlm and munge; installed when they are missing and this is root.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun")
WAIT_S = 300

# KillWait: what is told to end gets so many seconds (Slurm's default: 30).
# sched_interval: how often, in seconds, jobs whose time has come are looked for (60).
CONF = """
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=5
OverTimeLimit=0
SchedulerParameters=sched_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs={cpus}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """The running cluster. `env` is what its commands need."""

    folder: Path
    nodes: Sequence[str]
    env: Mapping[str, str]

    def sbatch(self, *argv: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """Submits; the job's id."""
        return self.run("sbatch", "--parsable", *argv, cwd=cwd, env=env).strip()

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a dict."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "-o", "show", "job", job)))

    def comes_back(self, job: str, start: int, *, limit: int | None = None) -> None:
        """Waits until the job is pending for its `start`-th return, and lets it begin soon (Slurm
        lets it wait for two minutes), with a time limit of `limit` minutes. Not at once: a node
        refuses a job for a second after it was taken from it."""
        self.wait(lambda: self._waits(job, start))
        time.sleep(2)
        if limit is not None:
            self.limit(job, limit)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def limit(self, job: str, minutes: int) -> None:
        """A job's time limit, from its start."""
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def minutes(self, job: str) -> int:
        """Whole minutes that a job has run."""
        hours, minutes, _ = self.show(job)["RunTime"].split(":")
        return int(hours) * 60 + int(minutes)

    def _waits(self, job: str, start: int) -> bool:
        shown = self.show(job)
        return (shown["JobState"], shown["Restarts"]) == ("PENDING", str(start))

    def ended(self, job: str, *, limit_s: float = WAIT_S) -> dict[str, str]:
        """Waits until the job is over and does not come back."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        self.wait(lambda: self.show(job)["JobState"] in over, limit_s=limit_s)
        return self.show(job)

    def wait(self, ready: Callable[[], bool], *, limit_s: float = WAIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not ready():
            assert time.monotonic() < deadline, f"not within {limit_s:g} s\n{self.describe()}"
            time.sleep(0.1)

    def describe(self) -> str:
        """The queue and the ends of the daemons' logs, for a failing test."""
        logs = "".join(
            f"== {name}\n" + "\n".join((self.folder / name).read_text().splitlines()[-15:]) + "\n"
            for name in ("slurmctld.log", *(f"slurmd_{node}.log" for node in self.nodes))
        )
        return self.run("scontrol", "show", "job") + logs

    def run(
        self, *argv: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        done = subprocess.run(
            [str(a) for a in argv],
            cwd=cwd,
            env={**self.env, **(env or {})},
            capture_output=True,
            check=False,
            text=True,
            timeout=WAIT_S,
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout


@contextmanager
def two_node_slurm(folder: Path) -> Iterator[Slurm]:
    """Starts the daemons and ends them, and whatever still runs under them."""
    _install()
    host = socket.gethostname().split(".")[0]
    nodes = (host, "localhost")  # Slurm takes a name that is a host's own only in this order
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(
            host=host,
            nodes=nodes,
            folder=folder,
            cpus=max(1, len(os.sched_getaffinity(0)) // 2),
            ctld_port=free_port(),
            ports=[free_port() for _ in nodes],
        )
    )
    (folder / "state").mkdir()
    env = dict(os.environ) | {"SLURM_CONF": str(conf)}
    slurm = Slurm(folder, nodes, env)
    daemons = []
    try:
        slurmds = (["slurmd", "-D", "-N", node] for node in nodes)
        for command in (_munged(folder), ["slurmctld", "-D"], *slurmds):
            log = (folder / f"{command[0]}.out").open("ab")
            daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
            if command[0] == "munged":
                slurm.wait((folder / "munge.socket").exists, limit_s=20)
        slurm.wait(lambda: _states(env) == ["idle", "idle"], limit_s=30)
        yield slurm
    finally:
        if len(daemons) == 4:
            subprocess.run(
                ["scancel", "--full", "--signal=KILL", "--user=root"], env=env, check=False
            )
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=20)


def _install() -> None:
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if not missing:
        return
    why = f"the tests of slurm/ need a real Slurm, and {', '.join(missing)} is not installed"
    assert os.geteuid() == 0, f"{why}; as root: apt-get install slurm-wlm munge"
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-qq", "-y", "--no-install-recommends", "slurm-wlm", "munge"],
    ):
        env = dict(os.environ) | {"DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(
            command, env=env, capture_output=True, check=False, text=True, timeout=300
        )
        assert done.returncode == 0, f"{why}; {' '.join(command)} failed:\n{done.stderr}"


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _munged(folder: Path) -> list[str]:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    return [
        "munged", "--foreground", "--force", f"--socket={folder}/munge.socket",
        f"--key-file={key}", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed",
        f"--log-file={folder}/munged.log", "--num-threads=2",
    ]  # fmt: skip


def _states(env: Mapping[str, str]) -> list[str]:
    command = ["sinfo", "--Node", "--noheader", "--format=%t"]
    done = subprocess.run(command, env=env, capture_output=True, check=False, timeout=30)
    return done.stdout.decode().split()
