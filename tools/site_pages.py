"""A hook of mkdocs: the pages that lie outside of docs/ become pages of the site.

README.md is about.md there (a folder's README would be its index); links between the pages follow.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("*.md", "examples/**/*.md", "examples/**/*.yaml", "examples/**/*.sh")
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            place = _on_site(path.relative_to(ROOT).as_posix())
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    folder = PurePosixPath(_on_site(source)).parent

    def moved(match: re.Match[str]) -> str:
        target = _on_site(normpath(f"{PurePosixPath(source).parent}/{match[1]}"))
        return f"]({relpath(target, folder)}{match[2] or ''})"

    return LINK.sub(moved, markdown)


def _on_site(path: str) -> str:
    """Where a file of the repository lies on the site."""
    return "about.md" if path == "README.md" else path.removeprefix("docs/")
