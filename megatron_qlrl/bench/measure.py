"""Measures both sides of a comparison in one process: interleaved rounds, medians, peak memory.

Machines are shared and noisy, so a figure means something only beside the other side's figure of
the same run.
"""

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megatron_qlrl.platform.device import has_gpu


@dataclass(frozen=True)
class Cost:
    """The cost of one call. `peak_bytes` is by how much its peak exceeds the memory in use before
    the call: of the process' resident memory on a CPU, of torch's allocations on a GPU."""

    cpu_s: float
    wall_s: float
    peak_bytes: int

    @property
    def work_s(self) -> float:
        """Seconds by the clock on a GPU. On a CPU, the CPU seconds of all threads, because the
        clock measures other processes, too."""
        return self.wall_s if has_gpu() else self.cpu_s


def measure(call: Callable[[], Any]) -> Cost:
    """Runs `call` once, on a CPU with one thread: threads that wait for each other use CPU time
    that depends on other processes (the same work has taken 6.6 and 18 CPU seconds)."""
    if not has_gpu():
        torch.set_num_threads(1)
    before = _reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if has_gpu():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Cost(cpu, wall, max(_peak() - before, 0))


def compare(sides: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, Cost]:
    """Returns each side's medians over `rounds`; the sides take turns, after one warm-up round."""
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, call in sides.items():
            cost = measure(call)
            if number:
                costs[name].append(cost)
    return {name: _median(side) for name, side in costs.items()}


def report(costs: Mapping[str, Cost]) -> dict[str, Any]:
    """Returns the sides' costs and the machine, ready for JSON."""
    return {"sides": {name: asdict(cost) for name, cost in costs.items()}, "machine": machine()}


def machine() -> dict[str, Any]:
    """Returns what the figures depend on: device, threads and versions."""
    return {
        "device": torch.cuda.get_device_name() if has_gpu() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _median(costs: list[Cost]) -> Cost:
    return Cost(
        median(c.cpu_s for c in costs),
        median(c.wall_s for c in costs),
        int(median(c.peak_bytes for c in costs)),
    )


def _reset_peak() -> int:
    """Resets the peak and returns the bytes in use."""
    gc.collect()
    if has_gpu():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return reset_host_peak()


def reset_host_peak() -> int:
    """Makes the peak of this process' resident memory begin anew, and returns the bytes in use."""
    # Freed pages that the allocator still holds would hide what the next call needs.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if has_gpu() else host_peak()


def host_peak() -> int:
    """Returns the most resident memory since `reset_host_peak`, in bytes."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
