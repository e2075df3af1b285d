import time

import pytest

from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.metrics.timer import Timer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Readings that the clock will give, in order."""
    readings: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: readings.pop(0))
    return readings


def test_blocks_of_one_name_add_up(clock: list[float]) -> None:
    clock += [10.0, 12.5, 20.0, 20.25]
    meter = Meter()
    for _ in range(2):
        with Timer(meter, "gen") as timer:
            pass
    assert meter.summary() == {"timing_s/gen": 2.75}
    assert timer.seconds == 0.25


def test_device_is_waited_for_at_both_ends_but_not_after_an_error(clock: list[float]) -> None:
    clock += [0.0, 1.0, 0.0, 2.0]
    calls: list[str] = []
    meter = Meter()
    with Timer(meter, "ok", synchronize=lambda: calls.append("ok")):
        calls.append("work")
    assert calls == ["ok", "work", "ok"]
    with (
        pytest.raises(RuntimeError),
        Timer(meter, "bad", synchronize=lambda: calls.append("bad")),
    ):
        raise RuntimeError
    assert calls[3:] == ["bad"]
    assert meter.summary() == {"timing_s/ok": 1.0, "timing_s/bad": 2.0}
