"""Defines the arms of the ablations: {no SFT, SFT} x {single, mixed, phased, retrospective}, one
with DAPO in place of GRPO, and one after long SFT. Every arm has the same budget of RL tokens."""

from dataclasses import dataclass
from typing import Literal

Start = Literal["base", "sft", "long_sft"]
Curriculum = Literal["single", "mixed", "phased", "retrospective"]
Algorithm = Literal["grpo", "dapo"]

LIMITS = {"short": 250, "long": 800, "longer": 3500}
"""Input limits in tokens, by the name of the documents they let in beside shorter ones."""
TRAIN_FILES = {"single": "train_longer"}
"""`single` trains on the longest documents alone, the other curricula on those of all lengths."""

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

# Steps of each phase for equal budgets of about 3.7M tokens, with each prompt counted once. A step
# generates 32 groups: about 10.9K tokens with short documents, 20.8K with long ones, 54K with the
# longest. The report's table shows the tokens that were really used.
STEPS: dict[Curriculum, dict[str, int]] = {
    "single": {"longer": 68},
    "mixed": {"longer": 130},
    "phased": {"short": 40, "long": 40, "longer": 45},
    "retrospective": {"short": 40, "long": 40, "longer": 57},
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
        return sum(STEPS[self.curriculum].values()) // 5

    @property
    def train_file(self) -> str:
        return TRAIN_FILES.get(self.curriculum, "train")

    @property
    def settings(self) -> list[str]:
        """The arm's dotted settings for `qlrl rl`."""
        phases = ", ".join(
            f"{{name: {name}, max_input_tokens: {LIMITS[name]}, steps: {num}}}"
            for name, num in STEPS[self.curriculum].items()
        )
        share = 0.25 if self.curriculum == "retrospective" else 0.0
        return [
            f"phases=[{phases}]",
            f"curriculum.carried_share={share}",
            *ALGORITHMS[self.algorithm],
        ]


GRID = [
    Arm(start, curriculum, "grpo")
    for start in ("base", "sft")
    for curriculum in ("single", "mixed", "phased", "retrospective")
]
MAIN = [*GRID, Arm("sft", "phased", "dapo")]
TRADE_OFF = Arm("long_sft", "phased", "grpo")
"""Compared with the same arm after short SFT."""
ARMS = [*MAIN, TRADE_OFF]
