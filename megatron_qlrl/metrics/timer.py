"""Wall-clock time of a part of the step."""

import time
from collections.abc import Callable
from types import TracebackType

from megatron_qlrl.metrics.meter import Meter


class Timer:
    """Adds the seconds spent in its block to the meter as `timing_s/<name>`.

        with Timer(meter, "gen"):
            rollouts = engine.generate(prompts)

    `synchronize` is called at both ends; pass torch.cuda.synchronize to time GPU work. A block
    that raises is counted too. `seconds` holds the last measurement.
    """

    def __init__(
        self, meter: Meter, name: str, *, synchronize: Callable[[], object] | None = None
    ) -> None:
        self._meter = meter
        self._name = f"timing_s/{name}"
        self._synchronize = synchronize or (lambda: None)
        self._start = 0.0
        self.seconds = 0.0

    def __enter__(self) -> "Timer":
        self._synchronize()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            # After an error the device may never answer.
            self._synchronize()
        self.seconds = time.perf_counter() - self._start
        self._meter.add(self._name, self.seconds)
