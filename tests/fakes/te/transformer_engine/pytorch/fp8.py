"""The autocast state and the record of products."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Product:
    """A linear layer's forward product: rows [rows, columns] of input; recipe and format None
    outside FP8."""

    recipe: str | None
    format: str | None
    rows: int
    columns: int


PRODUCTS: list[Product] = []


class FP8GlobalStateManager:
    recipe: Any = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls) -> Any:
        return cls.recipe


@contextmanager
def fp8_autocast(
    enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None
) -> Iterator[None]:
    before = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


def record(rows: int, columns: int) -> None:
    recipe = FP8GlobalStateManager.recipe
    name, kind = (type(recipe), recipe.fp8_format.name) if recipe else (None, None)
    # Megatron subclasses the delayed recipe.
    label = next(c.__name__ for c in name.__mro__ if "recipe" in c.__module__) if name else None
    PRODUCTS.append(Product(label, kind, rows, columns))
