"""Two sides of a comparison in one process: interleaved rounds, medians, peak memory.

Machines are shared and noisy, so a figure stands only beside the other side's of the same run.
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
    """What one call took. `peak_bytes` is the peak above what was in use before the call: of
    this process' resident memory on CPU, of torch's allocations on a GPU."""

    cpu_s: float
    wall_s: float
    peak_bytes: int

    @property
    def work_s(self) -> float:
        """CPU seconds of all threads on a CPU, where the clock measures the neighbours too;
        seconds by the clock on a GPU."""
        return self.wall_s if has_gpu() else self.cpu_s


def measure(call: Callable[[], Any]) -> Cost:
    """Runs `call` once, on a CPU with one thread: threads that wait for each other spin, and their
    CPU time then tells of the neighbours (seen: the same work at 6.6 and at 18 CPU seconds)."""
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
    """Medians over `rounds` of each side; the sides take turns, after one warm-up round."""
    found: dict[str, list[Cost]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, call in sides.items():
            cost = measure(call)
            if number:
                found[name].append(cost)
    return {name: _median(costs) for name, costs in found.items()}


def report(costs: Mapping[str, Cost]) -> dict[str, Any]:
    """The sides and the machine, ready for JSON."""
    return {"sides": {name: asdict(cost) for name, cost in costs.items()}, "machine": machine()}


def machine() -> dict[str, Any]:
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
    """Bytes in use now; the peak starts from here."""
    gc.collect()
    if has_gpu():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Freed pages that the allocator keeps would hide what the next call needs.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if has_gpu() else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith(name + ":"))
    return int(found.split()[1]) * 1024
