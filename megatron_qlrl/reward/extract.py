r"""Reads the final answer out of a response: text in, the answer as written out.

Nothing here evaluates what the model wrote. Every function accepts any text and runs in time
linear in its length.
"""

import re
from dataclasses import dataclass

from megatron_qlrl.reward.text import fold_width, strip_invisible

_OPEN, _CLOSE = "<think>", "</think>"
# Markdown may stand between the words: "the **answer** is:". The greedy start finds the last one.
_PHRASE = re.compile(
    r"(.*)(?<![a-z])the[\s*_]+(?:(?:final|correct)[\s*_]+)?answer[\s*_]+is(?![a-z])[\s*_:]*",
    re.IGNORECASE | re.DOTALL,
)
_DOUBT_CHARS = 40
_DOUBTS = frozenset(("if", "whether", "unless", "doubt", "deny"))
_BELIEFS = frozenset("think believe say claim sure certain clear true know".split())
_BOXED = re.compile(r".*\\(?:boxed|fbox)\s*\{", re.DOTALL)
_MACRO = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textit|mathrm|mathbf|mathit|operatorname)\s*\{", re.ASCII
)
_WRAPPERS = {
    "\\": (("\\(", "\\)"), ("\\[", "\\]")),
    "$": (("$$", "$$"), ("$", "$")),
    "(": (("(", ")"),),
    "[": (("[", "]"),),
}
_OPENING_OF = {")": "(", "]": "[", "}": "{"}
_MARKS = " \t\r\n*_`\"'“”‘’«»"
_MARKS_AND_ENDS = _MARKS + ".,;:!?"
_MAX_NESTING = 8

MAX_ANSWER_CHARS = 1000
"""A longer statement is no answer: it is logged, and no rule accepts it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The final answer as written, wrappers taken off, and the notation it was read from."""

    text: str
    notation: str


def final_text(response: str, *, reasoning_open: bool) -> str | None:
    """The part of a response that may hold the final answer; None while its reasoning is open.

    Reasoning that was opened, by the prompt (`reasoning_open`: the rendered chat template ends in
    `<think>`) or by the response itself, must be closed, and what follows the last `</think>` is
    the final text. A response without any reasoning is final as a whole: ordinary instruct models
    and Qwen3 with thinking off write no tags.
    """
    end = response.rfind(_CLOSE)
    if end < 0:
        return None if reasoning_open or _OPEN in response else response
    if response.find(_OPEN, end) >= 0:
        return None
    return response[end + len(_CLOSE) :]


def find_answer(final: str) -> Answer | None:
    r"""The answer after the last "the answer is", or else in the last `\boxed{}`.

    After the phrase a `\boxed{}` wins over the words around it. "I do not think the answer is X"
    states nothing.
    """
    final = strip_invisible(final.strip())
    phrase = _PHRASE.match(final)
    if phrase and _is_doubted(final, phrase.end(1)):
        return None
    tail = final[phrase.end() :] if phrase else final
    boxed = _last_boxed(tail)
    if boxed is not None:
        text, notation = boxed, "boxed"
    elif phrase:
        text, notation = _statement(tail), "the answer is"
    else:
        return None
    if len(text) <= MAX_ANSWER_CHARS:
        text = unwrap(fold_width(text))
    return Answer(text, notation) if text else None


def unwrap(text: str) -> str:
    """Takes off quotes, Markdown, LaTeX and brackets around the whole, and the final stop.

    Of "(Paris). The text says so." the brackets' inside is left. Round brackets come off once: the
    answer sentence itself asks for them. A second pair is the model's own and may mean something
    (accounting writes -5 as (5)).
    """
    has_round = False
    for _ in range(_MAX_NESTING):
        text = text.strip(_MARKS).lstrip(":").rstrip(_MARKS_AND_ENDS)
        inside = _leading_group(text)
        is_round = text.startswith("(")
        if inside is None or (is_round and has_round):
            break
        has_round = has_round or is_round
        text = inside
    return text


def _is_doubted(final: str, phrase_start: int) -> bool:
    """The words before the phrase: "I doubt that", "not sure whether", "do not think"."""
    words = final[max(0, phrase_start - _DOUBT_CHARS) : phrase_start].lower().split()
    if words and words[-1] == "that":
        words.pop()
    if len(words) > 1 and words[-1] in _BELIEFS:
        return words[-2].endswith(("not", "n't", "n’t"))
    return bool(words) and words[-1] in _DOUBTS


def _statement(tail: str) -> str:
    """The first paragraph, up to a line that ends its sentence: candidates in a column are one
    statement and no answer."""
    tail = tail.strip()
    if "\n" not in tail:
        return tail
    lines = []
    for line in tail.split("\n"):
        if not line.strip():
            break
        lines.append(line)
        if line.rstrip(_MARKS)[-1:] in (".", "!"):
            break
    return "\n".join(lines)


def _leading_group(text: str) -> str | None:
    """The inside of a wrapper that opens `text` and ends its sentence or line; else None."""
    macro = _MACRO.match(text) if text.startswith("\\") else None
    pairs = ((macro.group(), "}"),) if macro else _WRAPPERS.get(text[:1], ())
    for opening, closing in pairs:
        if not text.startswith(opening):
            continue
        end = _closing_index(text, len(opening), closing)
        if end < 0:
            continue
        rest = text[end + len(closing) :].lstrip(" \t*_\"'”’`")
        if _stands_alone(rest, opening):
            return text[len(opening) : end]
    return None


def _stands_alone(rest: str, opening: str) -> bool:
    """What follows a wrapper leaves it alone: "(Paris). The text says so." is one answer,
    "(A). (B)", "(Paris). London" and "(A)" above "(B)" are not."""
    if rest[:1] in (".", "!"):
        line = rest[1:].partition("\n")[0].strip(_MARKS)
        return not line or (_is_prose(line) and opening not in line)
    return not rest or (rest[0] in "\r\n" and not rest.lstrip().startswith(opening))


def _is_prose(line: str) -> bool:
    """Two words or more begin with a small letter: no row of names or numbers."""
    return sum(word[0].islower() for word in line.split()) >= 2


def _closing_index(text: str, start: int, closing: str) -> int:
    """Where the bracket that was opened before `start` closes; -1 when it does not."""
    opening = _OPENING_OF.get(closing)
    first = text.find(closing, start)
    if opening is None or text.find(opening, start, first) < 0:
        return first
    depth = 1
    for index in range(start, len(text)):
        depth += (text[index] == opening) - (text[index] == closing)
        if depth == 0:
            return index
    return -1


def _last_boxed(text: str) -> str | None:
    opening = _BOXED.match(text) if "box" in text else None
    if opening is None:
        return None
    end = _closing_index(text, opening.end(), "}")
    return text[opening.end() : end] if end > 0 else None


_CHOICE = re.compile(
    r"(?:(?i:option|choice)\s+)?"
    r"(?:[(\[]([A-Za-z])[)\]]|([A-Z])(?=[ \t]*(?:$|[).:,;\n]|[-–—]\s))|([a-z])$)"
)
_BRACKETED = re.compile(r"[(\[]([A-Za-z])[)\]]")
_ANOTHER = re.compile(r"[\s).,;:/&]*(?:(?:or|and)\s+)?[A-Z](?=[ \t]*(?:$|[).,;:/&\n]))")

_CAPITALS = re.compile(r"\b[A-Z]\b")
_HEDGE = re.compile(r"\s*(?:[,;]|(?:and|or|but)\b)")
_DENIAL = re.compile(r"\s*(?:is|isn|not|cannot)\b")


def parse_choice(text: str) -> str | None:
    """The one letter (upper case) that an answer such as "(B)", "B. Paris" or "option B" picks;
    None when there is no letter or more than one."""
    text = text.strip()
    found = _CHOICE.match(text)
    if not found:
        return None
    letter = (found[1] or found[2] or found[3]).upper()
    if found.end() == len(text):
        return letter
    others = {other.upper() for other in _BRACKETED.findall(text)} - {letter}
    if others or _ANOTHER.match(text, found.end()):
        return None
    # Another letter in an option's text is lawful ("B. Exhibit A"), after a hedge it is a choice.
    rest = text[found.end() :]
    hedged = _HEDGE.match(rest) and set(_CAPITALS.findall(rest)) - {letter, "I"}
    if hedged or _DENIAL.match(rest):
        return None
    # "A. Paris B. London": a row of options, in the order of their letters.
    following = re.search(rf"\s{chr(ord(letter) + 1)}[.):]\s", rest)
    return None if following else letter
