"""The pages of the docs agree with the code and with each other."""

import re
from pathlib import Path

import pytest

from tools import make_reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def test_config_reference_is_what_the_schema_says() -> None:
    fresh = make_reference.page()
    stale = make_reference.PAGE.read_text(encoding="utf-8") != fresh
    assert not stale, "docs/config.md is stale: run python tools/make_reference.py"


def test_every_setting_has_a_meaning() -> None:
    empty = [line for line in make_reference.page().splitlines() if line.endswith("|  |")]
    assert empty == []


def test_glossary_knows_names_and_patterns() -> None:
    assert len(make_reference.documented_metrics()) > 50
    known = ["actor/grad_norm", "stability/kl_spike", "source/my_set/critic/rewards/mean"]
    assert make_reference.undocumented([*known, "actor/unheard_of"]) == ["actor/unheard_of"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.relative_to(ROOT)}: {target} leads nowhere"
        if heading:
            assert heading in _anchors(file), f"{page.relative_to(ROOT)}: no heading {target}"


def _anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
