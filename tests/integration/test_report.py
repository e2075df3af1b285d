"""`qlrl report` in a real browser: the page draws itself, obeys mouse and keys, and shows hostile
text as text."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chromium import Page, open_page

from tests.run_folder import PAYLOADS, sample, step_line, write_evaluation, write_jsonl, write_run

CANVAS_COLORS = """[...document.querySelectorAll('canvas')].map((canvas) => new Set(
    new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)
    .data.buffer)).size)"""


def test_page_in_a_browser(tmp_path: Path, qlrl: Callable[..., Any]) -> None:
    first, second = write_run(tmp_path / "<img src=x onerror=alert(1)>"), write_run(tmp_path / "b")
    for step, payload in enumerate(PAYLOADS):
        hostile = sample(
            payload, data_source=payload, question=payload, prompt_end=payload, uid=payload
        )
        records = [hostile | {"prediction": payload}, sample(score=0.0, rule=0.0)]
        write_jsonl(first / "rollouts" / f"step_{step:06d}.jsonl", records)
    events = [step_line(step, **{"stability/kl_spike": 1}) for step in range(4)]
    write_jsonl(second / "metrics.jsonl", events)
    write_evaluation(second, "short", [1.0, 1.0, 1.0, 1.0])
    write_evaluation(second, "eval", [1.0, 0.0], benchmark="frames")
    out = tmp_path / "report.html"
    qlrl("report", first, second, "--out", out, "--rate", "2").check()
    asyncio.run(_look(out, tmp_path / "profile"))


async def _look(out: Path, profile: Path) -> None:
    async with open_page(out, profile=profile) as page:
        assert await page.evaluate("document.querySelectorAll('.uplot').length") > 3
        assert min(await page.evaluate(CANVAS_COLORS)) > 2
        assert await page.evaluate("[...document.querySelectorAll('main > section')]"
                                   ".every((part) => part.childElementCount > 1)")  # fmt: skip
        await _filters(page)
        await _hostile_text(page)
        await _keys(page)
        await page.prefer("dark")
        dark = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        await page.prefer("light")
        assert dark != await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert min(await page.evaluate(CANVAS_COLORS)) > 2
        assert page.problems == []


async def _filters(page: Page) -> None:
    total = 2 * len(PAYLOADS) + 4
    count = "document.getElementById('count').textContent"
    assert await page.evaluate(count) == f"{total} of {total} responses"
    for value, left in (("wrong (0)", len(PAYLOADS)), ("unfinished", 0), ("all", total)):
        await page.evaluate(
            f"""(() => {{ const select = document.getElementById('filter-score');
            select.value = {value!r};
            select.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"""
        )
        assert await page.evaluate(count) == f"{left} of {total} responses"


async def _hostile_text(page: Page) -> None:
    """Opens every response and looks at what the page has become."""
    await page.evaluate(
        """(() => { const more = [...document.querySelectorAll('#samples button')].at(-1);
        while (!more.hidden) more.click();
        for (const view of document.querySelectorAll('#list > details')) view.open = true; })()"""
    )
    await asyncio.sleep(0.5)  # views are filled when the browser says that they are open
    for tag in ("img", "svg", "iframe", "base", "link", "math", "template"):
        assert await page.evaluate(f"document.getElementsByTagName('{tag}').length") == 0
    assert await page.evaluate("document.getElementsByTagName('script').length") == 3
    shown = await page.evaluate("[...document.querySelectorAll('mark')].map((m) => m.textContent)")
    assert set(shown) == {payload.replace("\ud800", "?") for payload in PAYLOADS} | {"4"}
    assert "<img src=x onerror=alert(1)>" in await page.evaluate("document.title")


async def _keys(page: Page) -> None:
    """A chart's cursor moves with the arrows; the first Tab leads to the first link."""
    await page.evaluate("document.querySelector('#curves .card').focus()")
    value = "document.querySelector('#curves .card .u-value').textContent"
    before = await page.evaluate(value)
    await page.press("ArrowLeft")
    assert (before, await page.evaluate(value)) == ("–", "3")
    await page.press("ArrowLeft")
    assert await page.evaluate(value) == "2"
    await page.press("Tab")
    assert await page.evaluate("document.activeElement.className") == "card"
