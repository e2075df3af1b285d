"""The example of an own reward: its function by hand, its config, and both in a worker."""

import doctest
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from examples.custom_reward import partial_credit
from megatron_qlrl.config.load import load_config
from megatron_qlrl.reward.score import Scorer
from megatron_qlrl.types import Prompt, Score

ROOT = Path(__file__).resolve().parents[3]


def test_the_docstring_is_right() -> None:
    assert doctest.testmod(partial_credit).attempted == 1
    assert doctest.testmod(partial_credit).failed == 0


@pytest.mark.parametrize(
    ("gold", "final", "f1"),
    [
        ("bronze and eel", "Therefore, the answer is (bronze and eel).", 1.0),
        ("bronze and eel", "the answer is Bronze", 2 * 1 / (2 + 1)),
        ("bronze and eel", "the answer is (zinc and eel)", 2 * 1 / (2 + 2)),
        ("bronze and eel", "the answer is (zinc and trout)", 0.0),
        ("eel", "the answer is eel eel eel", 2 * 1 / (1 + 3)),
        ("eel", "the answer is trout", 0.0),
        ("eel", "it is eel", 2 * 1 / (1 + 3)),
        ("eel", "", 0.0),
    ],
)
def test_f1_by_hand(gold: str, final: str, f1: float) -> None:
    assert partial_credit.token_f1(gold, final) == pytest.approx(f1)


def test_the_config_finds_the_function_from_the_repository(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(Path("examples/custom_reward/config.yaml"))
    prompt = Prompt("f:0", np.zeros(1, np.int32), "toy_docqa_needles", "?", "bronze and eel")
    with closing(Scorer.of(config.reward)) as scorer:
        score = scorer.score(prompt, "Therefore, the answer is (zinc and eel).").result()
    assert score == Score(0.5, 0.5, matched="custom", prediction="zinc and eel")
