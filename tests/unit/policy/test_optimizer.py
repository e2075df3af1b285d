"""The learning rate by hand."""

import pytest

from megatron_qlrl.config.schema import OptimizerConfig
from megatron_qlrl.policy.optimizer import apply_settings, learning_rate


def rates(total: int, **settings: float) -> list[float]:
    config = OptimizerConfig.model_validate({"lr": 8.0, **settings})
    return [learning_rate(config, step=i, total_steps=total) for i in range(total)]


@pytest.mark.parametrize(
    ("total", "settings", "want"),
    [
        (3, {}, [8, 8, 8]),
        (4, {"warmup_steps": 2}, [4, 8, 8, 8]),
        (5, {"min_lr_ratio": 0.5}, [8, 7, 6, 5, 4]),
        (5, {"warmup_steps": 2, "min_lr_ratio": 0.0}, [4, 8, 8, 4, 0]),
        (2, {"warmup_steps": 4}, [2, 4]),
        (1, {"min_lr_ratio": 0.5}, [8]),
    ],
)
def test_learning_rate(total: int, settings: dict[str, float], want: list[float]) -> None:
    assert rates(total, **settings) == pytest.approx(want)


def test_beyond_the_last_step_it_stays_at_the_minimum() -> None:
    config = OptimizerConfig.model_validate({"lr": 8.0, "min_lr_ratio": 0.25})
    assert learning_rate(config, step=99, total_steps=5) == pytest.approx(2.0)


def test_every_parameter_group_gets_the_settings_of_the_config() -> None:
    """Not those of the checkpoint that was loaded into it."""

    class Optimizer:
        param_groups = [
            {"lr": 1.0, "betas": (0.5, 0.6), "eps": 1.0, "weight_decay": 0.1, "wd_mult": 1.0},
            {"lr": 2.0, "betas": (0.5, 0.6), "eps": 1.0, "weight_decay": 0.2, "wd_mult": 0.0},
        ]

    config = OptimizerConfig.model_validate({"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3})
    apply_settings(Optimizer, config, rate=0.5)
    same = {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    assert Optimizer.param_groups == [same | {"wd_mult": 1.0}, same | {"wd_mult": 0.0}]
