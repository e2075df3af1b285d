"""The page is one file that loads nothing, and text of a run cannot become markup or script."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_qlrl.errors import DataError
from megatron_qlrl.report import page as page_module
from megatron_qlrl.report.page import MAX_BYTES, as_script_data, report_page
from megatron_qlrl.report.read import read_runs
from tests.run_folder import PAYLOADS, sample, write_jsonl, write_run


class _Elements(HTMLParser):
    """Collects the start tags of a page and the texts of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def parsed(page: bytes) -> _Elements:
    elements = _Elements()
    elements.feed(page.decode())
    return elements


def data_of(page: bytes) -> Any:
    return json.loads(parsed(page).scripts[0])


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> _Elements:
    return parsed(report_page(read_runs([write_run(tmp_path_factory.mktemp("runs") / "a")])))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_of_a_run_stays_data(payload: str, tmp_path: Path, harmless: _Elements) -> None:
    folder = write_run(tmp_path / "a")
    hostile = sample(
        payload,
        data_source=payload,
        question=payload,
        prompt_end=payload,
        uid=payload,
        finished=payload,
    )
    lines = [json.dumps(hostile)]
    (folder / "rollouts" / "step_000000.jsonl").write_text("\n".join(lines) + "\n")
    start = {"commit": payload, payload: payload, "world_size": 2}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    page = report_page(read_runs([folder]))
    elements = parsed(page)
    assert [tag for tag, _ in elements.tags] == [tag for tag, _ in harmless.tags]
    assert elements.scripts[1:] == harmless.scripts[1:]
    assert not re.search("[<>&\u2028\u2029]", elements.scripts[0])
    shown = data_of(page)["runs"][0]["samples"][0]
    expected = payload.replace("\ud800", "?")
    names = ("response", "prompt_end", "data_source", "finished")
    assert [shown[name] for name in names] == [expected] * 4


def test_script_data_reads_back() -> None:
    value = {"a": ["<&>\u2028\u2029", None, 1.5]}
    text = as_script_data(value)
    assert text == '{"a":["\\u003c\\u0026\\u003e\\u2028\\u2029",null,1.5]}'
    assert json.loads(text) == value


def test_page_loads_nothing_and_runs_only_its_own_scripts(harmless: _Elements) -> None:
    assert not [a for _, attributes in harmless.tags for a in attributes if a in ("src", "srcset")]
    links = [attributes["href"] for _, attributes in harmless.tags if "href" in attributes]
    assert links and all(link and link.startswith("#") for link in links)
    policy = next(a["content"] for _, a in harmless.tags if a.get("http-equiv"))
    assert policy and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for script in harmless.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_script_makes_no_markup() -> None:
    script = (page_module._ASSETS / "page.js").read_text(encoding="utf-8")
    for name in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
    ):
        assert name not in script


def test_long_runs_are_thinned_to_the_limit(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    for step in range(150):
        records = [sample("x" * 20_000, sample=i) for i in range(8)]
        write_jsonl(folder / "rollouts" / f"step_{step:06d}.jsonl", records)
    page = report_page(read_runs([folder]))
    assert len(page) < MAX_BYTES
    run = data_of(page)["runs"][0]
    steps = sorted({s["step"] for s in run["samples"]})
    assert (steps[0], steps[-1]) == (0, 149)
    assert f"responses of {len(steps)} of 150 logged steps are shown" in run["notes"]
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) <= 10
    assert "texts of more than 6000 characters are cut in the middle" in run["notes"]


def test_what_never_fits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MAX_BYTES", 1_000)
    with pytest.raises(DataError, match="name fewer runs"):
        report_page(read_runs([write_run(tmp_path / "a")]))
