import math

import pytest

from megatron_qlrl.metrics.meter import Meter


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("actor/entropy", 2.0),
        ("response_length/max", 4.0),
        ("response_length/min", -1.0),
        ("perf/tokens/sum", 6.0),
        ("actor/ratio_max", 4.0),
        ("timing_s/gen", 6.0),
        ("actor/maximum", 2.0),
    ],
)
def test_reduction_by_name(name: str, expected: float) -> None:
    meter = Meter()
    for value in (3.0, -1.0, 4.0):
        meter.add(name, value)
    assert meter.summary() == {name: expected}


@pytest.mark.parametrize("name", ["a", "a/max", "a/min", "timing_s/a"])
def test_nan_is_seen(name: str) -> None:
    meter = Meter()
    for value in (1.0, math.nan, 2.0):
        meter.add(name, value)
    assert math.isnan(meter.summary()[name])


def test_order_is_that_of_the_first_value() -> None:
    meter = Meter()
    meter.update({"b": 1, "a": 2})
    meter.add("b", 3)
    assert list(meter.summary().items()) == [("b", 2.0), ("a", 2.0)]


def test_seconds_add_up_also_of_a_block_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 3.5, 10.0, 10.25, 20.0, 20.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    meter = Meter()
    with meter.timed("gen"):
        pass
    with pytest.raises(KeyError), meter.timed("gen"):
        raise KeyError
    with meter.timed("step"):
        pass
    assert meter.summary() == {"timing_s/gen": 2.75, "timing_s/step": 0.5}
    assert (meter.seconds("gen"), meter.seconds("ref")) == (2.75, 0.0)
