"""The pages of the docs agree with the code and with each other."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from megatron_qlrl.metrics.sinks import CONSOLE_METRICS
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


def test_readme_is_short_and_the_index_whole() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    linked = set(LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"index.md"} <= linked


def test_every_setting_has_a_meaning() -> None:
    empty = [line for line in make_reference.page().splitlines() if line.endswith("|  |")]
    assert empty == []


def test_glossary_knows_names_and_patterns() -> None:
    assert len(make_reference.documented_metrics()) > 50
    known = ["actor/grad_norm", "stability/kl_spike", "source/my_set/critic/rewards/mean"]
    assert make_reference.undocumented([*known, "actor/unheard_of"]) == ["actor/unheard_of"]


def test_console_shows_metrics_of_the_glossary() -> None:
    assert make_reference.undocumented(name for name, _ in CONSOLE_METRICS) == []


def test_hooks_have_the_versions_of_the_environment() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    lock = (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8")
    revisions = {repo["repo"].rpartition("/")[2]: repo["rev"] for repo in hooks["repos"]}
    assert revisions == {"ruff-pre-commit": "v" + re.search(r"^ruff==(.+)$", lock, re.M)[1]}


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 50
    texts = [text for file in ROOT.glob("megatron_qlrl/**/*.py") for text in _texts(file)]
    for message in messages:
        parts = [part.strip() for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(text) for text in texts), f"nobody says {message!r}"


def test_files_named_in_the_docs_exist() -> None:
    rooms = [path for path in (ROOT / "megatron_qlrl").iterdir() if path.is_dir()]
    tests = [path for path in (ROOT / "tests").glob("**/") if path.is_dir()]
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # tells of files that are gone, too
            continue
        roots = [ROOT, page.parent, ROOT / "megatron_qlrl", *rooms, *tests]
        for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|sh))`", page.read_text("utf-8")):
            assert any((root / name).is_file() for root in roots), f"{page.name}: no file {name}"


def _texts(file: Path) -> list[str]:
    """The string literals of a module, with … for what is filled in."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    formatted = [node.values for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    plain = [[node] for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
        for parts in (*formatted, *plain)
    ]


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
