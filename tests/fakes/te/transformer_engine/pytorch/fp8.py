"""The autocast state and the record of products."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ..common.recipe import Recipe


@dataclass(frozen=True)
class Product:
    """A linear layer's forward product of `rows` of input; the rest is None outside FP8.

    Attributes:
        ranks: those that agree on the largest values (delayed scaling).
    """

    recipe: str | None
    format: str | None
    ranks: tuple[int, ...] | None
    rows: int


PRODUCTS: list[Product] = []


class FP8GlobalStateManager:
    recipe: Any = None
    group: Any = None

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
    state = FP8GlobalStateManager
    before = state.recipe, state.group
    state.recipe, state.group = (fp8_recipe, fp8_group) if enabled else (None, None)
    try:
        yield
    finally:
        state.recipe, state.group = before


def record(rows: int) -> None:
    recipe = FP8GlobalStateManager.recipe
    if recipe is None:
        PRODUCTS.append(Product(None, None, None, rows))
        return
    # Megatron subclasses the delayed recipe.
    name = next(c.__name__ for c in type(recipe).__mro__ if c.__module__ == Recipe.__module__)
    group = FP8GlobalStateManager.group
    ranks = None if group is None else tuple(dist.get_process_group_ranks(group))
    PRODUCTS.append(Product(name, recipe.fp8_format.name, ranks, rows))


@contextmanager
def fp8_model_init(**_: Any) -> Iterator[None]:
    """Makes weights in FP8, which is never asked for here."""
    raise AssertionError
    yield
