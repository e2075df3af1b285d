import math

import numpy as np
import pytest

from megatron_qlrl.advantage.filters import has_spread

NAN = math.nan


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0, 0.0], True),
        ([0.0, 0.0, 0.0, 1.0], True),
        ([0.0, 0.0], False),
        ([1.0, 1.0], False),
        ([0.1, 0.1, 0.1], False),
        ([0.3, 0.7], True),
        ([0.3, 0.3, NAN, 0.7], True),
        ([0.7, NAN, 0.7], False),
        ([1.0], False),
        ([], False),
        ([NAN, NAN], False),
        ([1.0, NAN], False),
        ([1.0, NAN, 1.0], False),
        ([1.0, NAN, 0.0], True),
    ],
)
def test_spread_of_the_verdicts(rewards, expected):
    assert has_spread(np.array(rewards)) is expected
