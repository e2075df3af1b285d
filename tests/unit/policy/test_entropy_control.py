"""AEPO by hand: when responses are masked, and what is masked of a row."""

import math

import numpy as np

from megatron_qlrl.policy.entropy_control import EntropyControl
from megatron_qlrl.types import Block, PackedRow

ROW = PackedRow(
    np.zeros(6, np.int32),
    np.zeros(6, np.int32),
    (Block(0, (0, 1), (0, 2), ((2, 4), (4, 6))),),
    {
        "loss_weights": np.full(4, 0.25, np.float32),
        "advantages": np.array([-0.5, -0.5, 1.5, 1.5], np.float32),
    },
)


def test_masks_above_high_until_below_low() -> None:
    control = EntropyControl((1.0, 2.0))
    states = []
    for entropy in (0.5, 2.0, 2.1, 1.5, 1.0, math.nan, 0.9, 1.5, 2.5, 3.0, 0.1):
        control.observe(entropy)
        states.append(control.masking)
    # On the bounds, between them, and where the entropy is no number, nothing changes.
    assert states == [
        *(False, False),
        *(True, True, True, True),
        *(False, False),
        *(True, True),
        False,
    ]


def test_masking_takes_negative_advantages_and_leaves_the_weights() -> None:
    control = EntropyControl((1.0, 2.0))
    assert control.masked([ROW]) == [ROW]
    control.observe(2.5)
    (row,) = control.masked([ROW])
    assert row.columns["advantages"].tolist() == [0.0, 0.0, 1.5, 1.5]
    assert row.columns["loss_weights"].tolist() == [0.25] * 4
    assert ROW.columns["advantages"].tolist() == [-0.5, -0.5, 1.5, 1.5]
    assert row.blocks == ROW.blocks
