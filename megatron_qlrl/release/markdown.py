"""Markdown of a card: values of a user's config and files stand in code spans, where they are
neither markup nor a link."""

from collections.abc import Iterable, Sequence
from typing import Any

MAX_TEXT = 300


def plain(value: Any) -> str:
    """Returns a value as one line of printable characters, not longer than `MAX_TEXT`."""
    text = "".join(c if c.isprintable() else " " for c in str(value)).strip()
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."


def code(value: Any) -> str:
    """Returns a value as a code span that may stand in a table."""
    text = plain(value).replace("`", "'").replace("\\", "/").replace("|", "\\|")
    return f"`{text}`" if text else "(empty)"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
