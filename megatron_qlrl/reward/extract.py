r"""Reads the final answer out of a response: plain text in, text or a number out.

Nothing here evaluates what the model wrote. Every function accepts any text and runs in time
linear in its length.
"""

import math
import re
from dataclasses import dataclass

_CLOSE = "</think>"
# Markdown may stand between the words: "the **answer** is:".
_PHRASE = re.compile(
    r"(?<![a-z])the[\s*_]+(?:(?:final|correct)[\s*_]+)?answer[\s*_]+is(?![a-z])[\s*_:]*",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MACRO = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textit|mathrm|mathbf|mathit|operatorname)\s*\{", re.ASCII
)
_WRAPPERS = (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$"), ("(", ")"), ("[", "]"))
_MARKS = " \t\r\n*_`\"'“”‘’«»"
_ENDS = ".,;:!?"
_MAX_NESTING = 8


@dataclass(frozen=True)
class Answer:
    """The final answer as written, wrappers taken off, and the notation it was read from."""

    text: str
    notation: str


@dataclass(frozen=True)
class Number:
    """A number with its scale word applied; `percent` when it was written as a percentage
    (then `value` is the number before the sign)."""

    value: float
    percent: bool


def final_text(response: str) -> str | None:
    """What follows the last `</think>`; None when the reasoning was never closed."""
    _, closing, final = response.rpartition(_CLOSE)
    return final if closing else None


def find_answer(final: str) -> Answer | None:
    r"""The answer after the last "the answer is", or else in the last `\boxed{}`.

    After the phrase a `\boxed{}` wins over the words around it.
    """
    phrase = _last_match(_PHRASE, final)
    tail = final[phrase.end() :] if phrase else final
    boxed = _last_boxed(tail)
    if boxed is not None:
        text, notation = boxed, "boxed"
    elif phrase:
        text, notation = _first_statement(tail), "the answer is"
    else:
        return None
    text = unwrap(text)
    return Answer(text, notation) if text else None


def unwrap(text: str) -> str:
    """Takes off quotes, Markdown, LaTeX and brackets around the whole, and the final stop."""
    for _ in range(_MAX_NESTING):
        before = text
        text = text.strip(_MARKS).lstrip(":").rstrip(_ENDS + _MARKS)
        text = _leading_group(text) or text
        if text == before:
            break
    return text


def _first_statement(tail: str) -> str:
    tail = tail.lstrip()
    return _leading_group(tail) or tail.partition("\n")[0]


def _leading_group(text: str) -> str | None:
    """The inside of a wrapper that opens `text` and ends its sentence, else None."""
    macro = _MACRO.match(text)
    pairs = [(macro.group(), "}")] if macro else _WRAPPERS
    for opening, closing in pairs:
        if not text.startswith(opening):
            continue
        end = _closing_index(text, len(opening), closing)
        rest = text[end + len(closing) :].lstrip(" \t*_\"'”’`") if end > 0 else "open"
        alone = not rest or rest[0] in "\r\n"
        # "(A). (B)" is not one answer, "(Paris). The text says so." is.
        sentence = rest[:1] in (".", "!") and opening not in rest.partition("\n")[0]
        if alone or sentence:
            return text[len(opening) : end]
    return None


def _closing_index(text: str, start: int, closing: str) -> int:
    """Where the bracket that was opened before `start` closes; -1 when it does not."""
    opening = {")": "(", "]": "[", "}": "{"}.get(closing)
    if opening is None:
        return text.find(closing, start)
    depth = 1
    for index in range(start, len(text)):
        depth += (text[index] == opening) - (text[index] == closing)
        if depth == 0:
            return index
    return -1


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    matches = list(pattern.finditer(text))
    return matches[-1] if matches else None


def _last_boxed(text: str) -> str | None:
    opening = _last_match(_BOXED, text)
    if opening is None:
        return None
    end = _closing_index(text, opening.end(), "}")
    return text[opening.end() : end] if end > 0 else None


_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_SAME_CHARS = str.maketrans({"−": "-", "–": "-", "％": "%", "，": ",", "～": "~"})
_EQUALS = re.compile(r"=|≈|\\approx\b")
_LATEX_SPACE = re.compile(r"\\[,!;: ]|~")
_TEXT_MACRO = re.compile(r"\\(?:text|textbf|mathrm)\s*\{([^{}]*)\}")
_NUMBER = re.compile(
    r"(?:(?:approximately|approx\.?|about|around|roughly|nearly)\s+)?"
    r"(?P<sign>[-+]?)\s*(?:us\s?\$|usd|\$|€|£|¥)?\s*(?P<inner_sign>[-+]?)\s*"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?P<exponent>e[-+]?[0-9]{1,3})?"
    r"(?:\s*(?P<percent>%|percent\b|per\s+cent\b)"
    r"|\s*(?P<scale>thousand|million|billion|trillion)s?\b)?"
    r"(?P<unit>(?:\s+[a-z]+){0,6})"
)
# As a unit these would change the value in a way that is not read here.
_UNREAD_UNITS = frozenset(
    ("hundred", "thousand", "million", "billion", "trillion", "lakh", "crore", "dozen")
    + ("hundreds", "thousands", "millions", "billions", "trillions", "percent", "basis", "bps")
    + ("k", "m", "b", "mm", "mn", "mln", "bn", "tn", "cent", "cents", "or", "and", "not")
)
_MAX_NUMBER_CHARS = 120


def parse_number(text: str) -> Number | None:
    """Reads one number and nothing but one number; None when the text is anything else.

    Read are: a sign, a currency, thousands separators, decimals, an exponent, a percent sign or
    word, one scale word (thousand to trillion), a unit in words, LaTeX spacing, and the right
    side of an equation. Brackets do not negate: the answer sentence itself asks for them.
    """
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    text = text.translate(_SAME_CHARS).lower().replace("{,}", ",").replace(",\\!", ",")
    text = _LATEX_SPACE.sub(" ", _TEXT_MACRO.sub(r" \1", text))
    text = unwrap(_EQUALS.split(text.replace("\\%", "%").replace("\\$", "$"))[-1])
    found = _NUMBER.fullmatch(text)
    if not found or (found["sign"] and found["inner_sign"]):
        return None
    if _UNREAD_UNITS & set(found["unit"].split()):
        return None
    value = float(found["digits"].replace(",", "") + (found["exponent"] or ""))
    value *= _SCALES.get(found["scale"], 1.0)
    if math.isinf(value):
        return None
    negative = "-" in (found["sign"], found["inner_sign"])
    return Number(-value if negative else value, percent=bool(found["percent"]))


_CHOICE = re.compile(
    r"(?:(?i:option|choice)\s+)?"
    r"(?:[(\[]([A-Za-z])[)\]]|([A-Z])(?=\s*(?:$|[).:,;]|[-–—]\s))|([a-z])$)"
)
_BRACKETED = re.compile(r"[(\[]([A-Za-z])[)\]]")
_ANOTHER = re.compile(r"[\s).,;:/&]*(?:(?:or|and)\s+)?[A-Z](?=\s*(?:$|[).,;:/&]))")


def parse_choice(text: str) -> str | None:
    """The one letter (upper case) that an answer such as "(B)", "B. Paris" or "option B" picks;
    None when there is no letter or more than one."""
    text = text.strip()
    found = _CHOICE.match(text)
    if not found:
        return None
    letter = next(group for group in found.groups() if group).upper()
    others = {other.upper() for other in _BRACKETED.findall(text)} - {letter}
    return None if others or _ANOTHER.match(text, found.end()) else letter
