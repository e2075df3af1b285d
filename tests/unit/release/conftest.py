"""A released folder that passes every static check."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CARD = "---\nbase_model: a/b\nlicense: mit\n---\n\n# x\n"


@pytest.fixture
def release_folder(fake_hf: Callable[..., Path]) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        folder = fake_hf(**({"dtype": "float32"} | changes))
        (folder / "README.md").write_text(CARD)
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        return folder

    return make


@pytest.fixture
def edit_json() -> Callable[..., None]:
    def edit(file: Path, **changes: Any) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit
