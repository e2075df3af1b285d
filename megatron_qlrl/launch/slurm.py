"""Checks the nodes of a Slurm job before its run, and counts its failures afterwards.

    batch script -> `qlrl slurm check`, one task on each node -> `qlrl rl`, one task for each GPU
                 -> `qlrl slurm after-failure` decides whether a failed job is queued again

The batch scripts are in slurm/; they read the exit codes and requeue the job.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_qlrl.config.run_folder import checkpoints_of
from megatron_qlrl.errors import ConfigError, QlrlError
from megatron_qlrl.platform.env import init_ranks

REACH_S = 120.0
"""How long a node waits for the others before it says that they cannot be reached."""
MAX_SKEW_S = 5.0
"""Clocks that differ by more make logs and file times useless."""
USED_MIB = 2048
"""A GPU with more memory taken before the job starts is in use by another process."""


@dataclass(frozen=True)
class Node:
    """What a node says about itself.

    Attributes:
        versions: versions by name, which must be the same on all nodes.
        gpus: (total, used) memory of each GPU, in MiB.
        free_bytes: free space of the disk under run.dir.
        clock_s: the node's time, read on all nodes at the same moment.
        sees: whether the node sees the file that the first node wrote into run.dir.
    """

    name: str
    versions: Mapping[str, str]
    gpus: Sequence[Sequence[int]]
    free_bytes: int
    clock_s: float
    sees: bool


def check_nodes(
    prepare: Callable[[], tuple[Path, int]],
    *,
    names: Sequence[str],
    tasks_per_node: int,
    versions: Mapping[str, str],
) -> list[str]:
    """Returns what does not fit, the same list on all nodes. One task on each node calls it.

    Args:
        prepare: checks what the run reads; returns run.dir and the bytes that must be free there.
        names: the nodes' names in rank order.
        tasks_per_node: each task needs a GPU of its own, where there are any.
        versions: this node's versions, which must be the same on all nodes.

    Raises:
        ConfigError: nodes do not reach each other.
    """
    ranks = init_ranks()
    gather = _meet(ranks.rank, names)
    mark = f".nodes_{os.environ.get('SLURM_JOB_ID', '')}"
    folder, need_bytes, problem = Path(), 0, ""
    try:
        folder, need_bytes = prepare()
        if ranks.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / mark).touch()
    except QlrlError as error:
        problem = str(error)
    except OSError as error:
        problem = f"run.dir {folder} cannot be written: {error.strerror}"
    problems = by_node(dict(zip(names, gather("problem", problem), strict=True)))
    if not problems:
        clock_s = time.time()
        node = Node(
            name=names[ranks.rank],
            versions=versions,
            gpus=read_gpus(),
            free_bytes=shutil.disk_usage(folder).free if folder.is_dir() else 0,
            clock_s=clock_s,
            sees=(folder / mark).is_file(),
        )
        nodes = [Node(**fields) for fields in gather("node", asdict(node))]
        if ranks.rank == 0:
            (folder / mark).unlink()
        problems = compare(nodes, tasks_per_node=tasks_per_node, need_bytes=need_bytes)
    gather("end", None)  # the first node hosts the store and must not leave before the others
    return problems


def compare(nodes: Sequence[Node], *, tasks_per_node: int, need_bytes: int) -> list[str]:
    """Returns one line, with the node's name, for everything in which a node is unfit. Nodes are
    compared with the first one."""
    return [
        f"{node.name}: {problem}"
        for node in nodes
        for problem in _misfits(node, nodes[0], tasks_per_node, need_bytes)
    ]


def _misfits(node: Node, first: Node, tasks_per_node: int, need_bytes: int) -> Iterator[str]:
    if not node.sees:
        yield f"does not see run.dir of {first.name}; it must lie on a file system they share"
    elif node.free_bytes < need_bytes:
        free, need = node.free_bytes / 1e9, need_bytes / 1e9
        yield f"run.dir has {free:.1f} GB free, a checkpoint needs about {need:.1f} GB"
    yield from _gpu_misfits(node, first, tasks_per_node)
    for what, version in node.versions.items():
        if version != first.versions.get(what):
            yield f"{what} is {version}, on {first.name} {first.versions.get(what)}"
    skew = node.clock_s - first.clock_s
    if abs(skew) > MAX_SKEW_S:
        yield f"its clock is {skew:+.0f} s off that of {first.name}"


def _gpu_misfits(node: Node, first: Node, tasks_per_node: int) -> Iterator[str]:
    if len(node.gpus) != len(first.gpus):
        yield f"{len(node.gpus)} GPU(s), {first.name} has {len(first.gpus)}"
    elif node.gpus and len(node.gpus) < tasks_per_node:
        yield f"{len(node.gpus)} GPU(s) for {tasks_per_node} tasks"
    for index, (total, used) in enumerate(node.gpus):
        if first.gpus and total != first.gpus[0][0]:
            yield f"GPU {index} has {total} MiB, GPU 0 of {first.name} {first.gpus[0][0]} MiB"
        if used > USED_MIB:
            yield f"GPU {index}: {used} MiB of {total} are in use by another process"


def by_node(problems: Mapping[str, str]) -> list[str]:
    """Returns the nodes' problems ("" is none): one line if all have the same, else one line for
    each node that has one, with its name."""
    texts = set(problems.values())
    if len(texts) == 1:
        return [text for text in texts if text]
    return [f"{name}: {text}" for name, text in problems.items() if text]


def read_gpus() -> list[tuple[int, int]]:
    """Returns (total, used) memory in MiB of each GPU that nvidia-smi lists, or [] without it."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.total,memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, check=False, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise ConfigError(
            f"{socket.gethostname()}: nvidia-smi failed: {(done.stdout + done.stderr).strip()}"
        )
    return parse_gpus(done.stdout)


def parse_gpus(table: str) -> list[tuple[int, int]]:
    """Returns (total, used) memory in MiB of each GPU in nvidia-smi's table.

    >>> parse_gpus("81559, 4\\n81559, 0\\n")
    [(81559, 4), (81559, 0)]
    """
    rows = [line.split(",") for line in table.splitlines() if line.strip()]
    return [(int(total), int(used)) for total, used in rows]


def count_failure(run_dir: Path) -> int:
    """Returns how often this job has failed since its newest checkpoint, this time included."""
    job = os.environ.get("SLURM_JOB_ID", "")
    record = run_dir / "failures.json"
    folders = checkpoints_of(run_dir)
    since = {"job": job, "checkpoint": folders[-1].name if folders else ""}
    before = json.loads(record.read_text()) if record.is_file() else {}
    count = before["count"] + 1 if since.items() <= before.items() else 1
    run_dir.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(since | {"count": count}))
    return count


def _meet(rank: int, names: Sequence[str]) -> Callable[[str, Any], list[Any]]:
    """Returns a function that gathers JSON values over all nodes, after checking that every node
    reaches MASTER_ADDR and that all can exchange data."""
    import torch
    import torch.distributed as dist

    from megatron_qlrl.platform.device import has_gpu

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=REACH_S)
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            *place, len(names), rank == 0, timeout=patience, wait_for_workers=False
        )
    except RuntimeError as error:
        raise ConfigError(
            f"node {names[rank]} cannot reach {place[0]}:{place[1]} on {names[0]} within "
            f"{REACH_S:g} s: {_first_line(error)}"
        ) from error

    def gather(what: str, value: Any) -> list[Any]:
        store.set(f"{what}/{rank}", json.dumps(value))
        missing = []
        for index, name in enumerate(names):
            try:
                store.wait([f"{what}/{index}"], patience if not missing else timedelta(seconds=1))
            except RuntimeError:
                missing.append(name)
        if missing:
            raise ConfigError(
                f"node {names[rank]} waited {REACH_S:g} s in vain for {', '.join(missing)}"
            )
        return [json.loads(store.get(f"{what}/{index}")) for index in range(len(names))]

    gather("here", None)
    backend = "nccl" if has_gpu() else "gloo"
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=len(names), timeout=patience
        )
        total = torch.ones(1, device="cuda:0" if has_gpu() else "cpu")
        dist.all_reduce(total)
        assert total.item() == len(names)
    except RuntimeError as error:
        raise ConfigError(
            f"node {names[rank]}: {backend} cannot exchange data with the other nodes "
            f"({', '.join(names)}): {_first_line(error)}"
        ) from error
    return gather


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
