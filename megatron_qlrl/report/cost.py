"""What a run took: seconds, process-hours and tokens, from its record."""

from collections.abc import Mapping
from typing import Any

from megatron_qlrl.report.read import Run, is_number

STAGES = (
    "update_weights",
    "probe",
    "gen",
    "reward",
    "adv",
    "ref",
    "old_log_prob",
    "update_actor",
    "self_check",
)
"""Parts of a step whose seconds are on record as timing_s/<stage>."""


def _processes(line: Mapping[str, float], otherwise: float) -> float:
    """Returns how many processes took a step: perf/throughput is tokens a second of each."""
    alone = line.get("perf/throughput", 0) * line.get("timing_s/step", 0)
    return round(line.get("perf/total_num_tokens", 0) / alone) if alone > 0 else otherwise


def run_cost(run: Run, rate: float | None = None) -> dict[str, Any]:
    """Returns the seconds and process-hours of each stage, and what the run took as a whole. Steps
    that a resumed run repeats count once; starting a run counts nowhere."""
    seconds: dict[str, float] = {}
    hours: dict[str, float] = {}
    ranks = [start["world_size"] for start in run.starts if is_number(start.get("world_size"))]
    world = float(ranks[0]) if ranks else 1.0

    def add(stage: str, value: float) -> None:
        seconds[stage] = seconds.get(stage, 0.0) + value
        hours[stage] = hours.get(stage, 0.0) + value * world / 3600

    for line in run.steps:
        world = _processes(line, world)
        parts = {stage: line.get(f"timing_s/{stage}", 0.0) for stage in STAGES}
        for stage, value in parts.items():
            add(stage, value)
        add("rest of the steps", max(line.get("timing_s/step", 0.0) - sum(parts.values()), 0.0))
        add("save_checkpoint", line.get("timing_s/save_checkpoint", 0.0))
    for line in run.tests:
        add("testing", line.get("timing_s/testing", 0.0))
    total = sum(hours.values())
    return {
        "stages": [[name, seconds[name], hours[name]] for name in seconds if seconds[name] > 0],
        "seconds": sum(seconds.values()),
        "hours": total,
        "unit": "GPU" if _on_gpu(run) else "CPU process",
        "processes": world,
        "tokens": sum(line.get("perf/total_num_tokens", 0) for line in run.steps),
        "money": None if rate is None else total * rate,
    }


def _on_gpu(run: Run) -> bool:
    return any("perf/max_memory_allocated_gb" in line for line in run.steps)
