"""Puts what is known of runs, the script and the plotting library into one HTML file."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_qlrl.errors import DataError
from megatron_qlrl.report.content import contents
from megatron_qlrl.report.read import Run

MAX_BYTES = 5_000_000
_ASSETS = Path(__file__).parent / "assets"
_ESCAPED = {c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def report_page(runs: Sequence[Run], *, rate: float | None = None) -> bytes:
    """Returns the page, in UTF-8. Curves and samples are thinned until it is small enough.

    Args:
        rate: price of one process for one hour.

    Raises:
        DataError: it has more than `MAX_BYTES` whatever is left out.
    """
    for detail in (1.0, 0.5, 0.25, 0.1, 0.02):
        page = _filled(contents(runs, rate=rate, detail=detail))
        if len(page) <= MAX_BYTES:
            return page
    raise DataError(
        f"a report of {len(runs)} run(s) has more than {MAX_BYTES / 1e6:g} MB; name fewer runs"
    )


def _filled(data: Any) -> bytes:
    library, script = _asset("uplot/uPlot.iife.min.js"), _asset("page.js")
    style = _asset("uplot/uPlot.min.css") + _asset("page.css")
    parts = {
        "policy": _policy(scripts=(library, script), style=style),
        "style": style,
        "data": as_script_data(data),
        "library": library,
        "script": script,
    }
    # One pass: what a run wrote is never looked through for placeholders.
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _asset("page.html"))
    return page.encode("utf-8", errors="replace")  # half of a surrogate pair is no character


def as_script_data(data: Any) -> str:
    """Returns `data` as JSON that a <script> element can hold: no character in it can end the
    element, begin another, or end a line of JavaScript."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(str.maketrans(_ESCAPED))


def _policy(*, scripts: Sequence[str], style: str) -> str:
    """Returns a Content-Security-Policy under which exactly these scripts and this style work:
    nothing is loaded, and no text becomes markup."""
    hashes = " ".join(_hash(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
