"""Recipes as records of what they were made with. As in the real ones, unknown arguments are
ignored (pydantic's dataclasses do so) and Megatron passes some."""

from enum import Enum
from typing import Any


class Format(Enum):
    E4M3 = 1
    HYBRID = 2


class Recipe:
    def __init__(self, *, fp8_format: Format, **_: Any) -> None:
        self.fp8_format = fp8_format


class DelayedScaling(Recipe):
    pass


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    pass
