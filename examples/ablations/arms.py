"""Defines the arms of the ablations: {no SFT, SFT} x {single, mixed, phased, retrospective}, and
one after long SFT. Every arm has the same budget of RL tokens."""

from dataclasses import dataclass
from typing import Literal

Start = Literal["base", "sft", "long_sft"]
Curriculum = Literal["single", "mixed", "phased", "retrospective"]

LIMITS = {"short": 250, "long": 800, "longer": 3500}
"""Input limits in tokens, by the name of the documents they let in beside shorter ones."""
TRAIN_FILES = {"single": "train_longer"}
"""`single` trains on the longest documents alone, the other curricula on those of all lengths."""

SFT_STEPS: dict[Start, int] = {"sft": 30, "long_sft": 120}

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

    @property
    def name(self) -> str:
        return f"{self.start}-{self.curriculum}"

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
        return [f"phases=[{phases}]", f"curriculum.carried_share={share}"]


MAIN = [
    Arm(start, curriculum)
    for start in ("base", "sft")
    for curriculum in ("single", "mixed", "phased", "retrospective")
]
TRADE_OFF = Arm("long_sft", "phased")
"""Compared with the same arm after short SFT."""
ARMS = [*MAIN, TRADE_OFF]
