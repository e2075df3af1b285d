"""Defines the arms of the ablations: {no SFT, SFT} x {single phase, phased, phased + retrospective}
x {GRPO, DAPO}, and long SFT for the trade-off. Every arm has the same budget of RL tokens."""

from dataclasses import dataclass
from typing import Literal

Start = Literal["base", "sft", "long_sft"]
Curriculum = Literal["single", "phased", "retrospective"]
Algorithm = Literal["grpo", "dapo"]

SHORT, LONG = 250, 800
"""Input limits of the two phases, in tokens."""

SFT_STEPS: dict[Start, int] = {"sft": 30, "long_sft": 120}

ALGORITHMS: dict[Algorithm, tuple[str, ...]] = {
    "grpo": (
        "algorithm.aggregation=sequence_mean",
        "algorithm.clip_high=0.2",
        "algorithm.filter_groups=false",
    ),
    "dapo": (
        "algorithm.aggregation=token_mean",
        "algorithm.clip_high=0.28",
        # Here, too, 32 groups are generated; at most 16 of those with spread are trained on.
        "rollout.prompts_per_step=16",
        "algorithm.oversampling=2.0",
        "algorithm.overlong_buffer_tokens=8",
    ),
}

# Steps of each phase for equal budgets of 1.24M tokens, with each prompt counted once. A step
# generates 32 groups: about 10.9K tokens with short documents, 15.8K with both, 20.6K with long
# ones. The report's table shows the tokens that were really used.
STEPS: dict[Curriculum, tuple[int, ...]] = {
    "single": (79,),
    "phased": (23, 48),
    "retrospective": (23, 53),
}


@dataclass(frozen=True)
class Arm:
    start: Start
    curriculum: Curriculum
    algorithm: Algorithm

    @property
    def name(self) -> str:
        return f"{self.start}-{self.curriculum}-{self.algorithm}"

    @property
    def every_steps(self) -> int:
        """Steps between evaluations, for about five points on each curve."""
        return sum(STEPS[self.curriculum]) // 5

    @property
    def settings(self) -> list[str]:
        """The arm's dotted settings for `qlrl rl`."""
        steps = STEPS[self.curriculum]
        limits = (SHORT, LONG) if len(steps) == 2 else (LONG,)
        phases = ", ".join(
            f"{{name: up_to_{limit}, max_input_tokens: {limit}, steps: {num}}}"
            for limit, num in zip(limits, steps, strict=True)
        )
        share = 0.25 if self.curriculum == "retrospective" else 0.0
        return [
            f"phases=[{phases}]",
            f"curriculum.carried_share={share}",
            *ALGORITHMS[self.algorithm],
        ]


MAIN = [
    Arm(start, curriculum, algorithm)
    for start in ("base", "sft")
    for curriculum in ("single", "phased", "retrospective")
    for algorithm in ("grpo", "dapo")
]
TRADE_OFF = Arm("long_sft", "retrospective", "grpo")
"""Compared with the same arm after short SFT."""
ARMS = [*MAIN, TRADE_OFF]
