"""Collects the values of one step under verl's metric names and reduces them by name."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np


class Meter:
    """Values of one step; the last part of a name says how they are reduced.

    `.../max`, `.../min` and `.../sum` mean what they say, durations (`timing_s/...`) add up,
    everything else is averaged. A NaN among the values makes the result NaN: it must be seen.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self._values.setdefault(name, []).append(float(value))

    def update(self, metrics: Mapping[str, float]) -> None:
        """Adds one value to each name."""
        for name, value in metrics.items():
            self.add(name, value)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside as `timing_s/<name>`, also when the block raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(f"timing_s/{name}", time.perf_counter() - started)

    def seconds(self, name: str) -> float:
        """The seconds that `timed(name)` has measured so far."""
        return math.fsum(self._values.get(f"timing_s/{name}", ()))

    def summary(self) -> dict[str, float]:
        """One number per name, in the order in which the names came first."""
        return {name: reduce_values(name, values) for name, values in self._values.items()}


def reduce_values(name: str, values: list[float]) -> float:
    """The reduction that `name` asks for; `values` is not empty."""
    last = name.rsplit("/", 1)[-1].rsplit("_", 1)[-1]
    array = np.asarray(values, dtype=np.float64)
    if last == "max":
        return float(array.max())
    if last == "min":
        return float(array.min())
    if last == "sum" or name.startswith("timing_s/"):
        return math.fsum(values)
    return float(array.mean())
