r"""Reads the final answer of a response, as the model wrote it.

Nothing here evaluates what the model wrote. Every function accepts any text and runs in time
linear in its length.
"""

import re
from dataclasses import dataclass

from megatron_qlrl.reward.doubt import (
    denied_before,
    leads_away,
    taken_back,
    thought_before,
)
from megatron_qlrl.reward.text import fold_width, strip_invisible

_OPEN, _CLOSE = "<think>", "</think>"
# Markdown may stand between the words: "the **answer** is:". The greedy start finds the last one.
_PHRASE = re.compile(
    r"(.*)(?<![a-z])the[\s*_]+(?:(?:final|correct)[\s*_]+)?answer[\s*_]+is(?![a-z])[\s*_:]*",
    re.IGNORECASE | re.DOTALL,
)
_BOXED = re.compile(r"(.*)\\(?:boxed|fbox)\s*\{", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}")
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
_MARKS_AND_ENDS = _MARKS + ".,;:!"  # "Paris?" is a question and keeps its mark
_PAUSES = frozenset(",;:—–")
_MAX_NESTING = 8

MAX_ANSWER_CHARS = 1000
"""A longer statement is logged, but no rule accepts it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The final answer as written, without wrappers, and the notation in which it was found."""

    text: str
    notation: str


def final_text(response: str, *, reasoning_open: bool) -> str | None:
    """Returns the part of a response that may hold the final answer, or None if its reasoning is
    not closed.

    Reasoning that the response or its prompt has opened must be closed, and the final text follows
    the last `</think>`. A response without any reasoning is final as a whole: ordinary instruct
    models and Qwen3 with thinking off write no tags.

    Args:
        reasoning_open: whether the prompt had opened `<think>`.
    """
    end = response.rfind(_CLOSE)
    if end < 0:
        return None if reasoning_open or _OPEN in response else response
    if response.find(_OPEN, end) >= 0:
        return None
    return response[end + len(_CLOSE) :]


def find_answer(final: str) -> Answer | None:
    r"""Returns the answer after the last "the answer is", or else in the last `\boxed{}`, or None.

    After the phrase a `\boxed{}` takes precedence over the words around it. "I do not think the
    answer is X" states no answer. If the words around an answer deny, change or retract it, they
    are returned with it ("not Paris", "5 million", "Paris. Wait, no"), so that neither the rule nor
    the judge reads it without them.
    """
    final = strip_invisible(final.strip())
    phrase = _PHRASE.match(final)
    start = phrase.end(1) if phrase else 0
    if phrase and denied_before(final[:start], starts_sentence=final[start] == "T"):
        return None
    tail = final[phrase.end() :] if phrase else final
    opening = _BOXED.match(tail) if "box" in tail else None
    end = _closing_index(tail, opening.end(), "}") if opening else -1
    if opening and end > 0:
        text, behind = _boxed(tail, opening, end, has_phrase=phrase is not None)
        notation = "boxed"
    elif phrase:
        text, behind = _statement(tail)
        notation = "the answer is"
    else:
        return None
    if behind and taken_back(behind, text):
        text = _BOX.sub(r" \1 ", f"{text} {behind}")
    if len(text) <= MAX_ANSWER_CHARS:
        text = unwrap(fold_width(text))
    return Answer(text, notation) if text else None


def unwrap(text: str) -> str:
    """Removes quotes, Markdown, LaTeX and brackets around the whole text, and the final stop.

    "(Paris). The text says so." becomes "Paris". Round brackets are removed once, because prompts
    ask for them; a second pair is the model's own and may mean something (accounting writes -5 as
    (5)).
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


def _statement(tail: str) -> tuple[str, str]:
    """Splits a text after the line that ends its first sentence or paragraph. Candidates in a
    column thus stay together, and are no answer."""
    tail = tail.strip()
    if "\n" not in tail:
        return tail, ""
    end = 0
    for line in tail.split("\n"):
        if not line.strip():
            break
        end += len(line) + 1
        if line.rstrip(_MARKS)[-1:] in (".", "!", "?"):
            break
    return tail[:end].rstrip("\n"), tail[end:]


# What a box may follow: a word, a colon, one equals sign, a macro that is only layout. After
# anything else ("-", ">", "\neq", "\sqrt{", another number) its inside is not the whole answer.
_FREE_BEFORE = re.compile(
    r"(?:^|[.!?;,:]|(?<![<>!=/~+*^-])=|[≈→⇒]|(?<![\\A-Za-z])[^\W\d_]+|\\text\w*\s*\{[^{}]*\}"
    r"|\\(?:textbf|text|mathbf|mathrm|boldsymbol|q?quad|approx|therefore|implies|Rightarrow|to))$"
)
_SMALL_LEAD = re.compile(
    r"(?:^|(?<![<>!=/~+*^-])=|[≈→⇒]|\\approx|\\text\w*\s*\{[^{}]*\}"
    r"|^(?:[\W_]*(?:the|an?|it|is|was|that|in|on|at|of|simply|clearly|therefore|thus|hence|then|so"
    r"|indeed|exactly|about|approximately|option|choice|letter|given|by|as|follows|equal|to|value"
    r"|number|amount|total)\b)+[\s:,]*)$",
    re.IGNORECASE,
)
# What may follow a box in its sentence: nothing, a reason, a clause after a comma.
_FREE_BEHIND = re.compile(
    r"$|[.!](?!\w)|\n\s*$|(?:because|since|which|according to|based on)\b|[,;:—–]\s*[a-z]"
)
_BOX_END = re.compile(r"[.!?](?=[\s*_\"'”’`)\]}$]|$)|\n")
_BEFORE_BOX, _BEHIND_BOX = " \t\r\n*_`\"'“”‘’#$([{\\", " \t*_`\"'“”‘’$)]}\\"


def _boxed(tail: str, opening: re.Match[str], end: int, *, has_phrase: bool) -> tuple[str, str]:
    """Returns the answer in the box from `opening` to `end`, and the text after its sentence.

    The answer is the box's inside, or the whole sentence if that denies or changes it or holds
    another box: "not Paris", "- 5", "5 million", "A or B". Between "the answer is" and the box only
    small words may stand: in "the answer is London, [box]" the box is the second of two answers.
    """
    inside, before, after = tail[opening.end() : end], tail[: opening.end(1)], tail[end + 1 :]
    stop = _BOX_END.search(after)
    after, behind = (after[: stop.end()], after[stop.end() :]) if stop else (after, "")
    next_line = behind.partition("\n")[0].strip(_BEHIND_BOX)
    if after.endswith("\n") and next_line and not _is_prose(next_line):  # a column
        after, behind = after + next_line, behind.partition("\n")[2]
    lead = before.rstrip(_BEFORE_BOX)
    thought = thought_before(lead)
    rest = after.lstrip(_BEHIND_BOX)
    follows_phrase = has_phrase and len(thought) == len(lead)
    if (
        (_SMALL_LEAD if follows_phrase else _FREE_BEFORE).search(thought)
        and _FREE_BEHIND.match(rest)
        and (rest[:1] not in _PAUSES or _is_prose(rest[1:]))
        and not (leads_away(thought) or _BOX.search(thought) or taken_back(rest, inside))
    ):
        return inside, behind
    return _BOX.sub(r" \1 ", f"{thought} {inside} {rest.rstrip(_BEHIND_BOX)}"), behind


def _leading_group(text: str) -> str | None:
    """Returns the inside of a wrapper that opens `text` and ends its sentence or line, or None."""
    macro = _MACRO.match(text) if text.startswith("\\") else None
    pairs = ((macro.group(), "}"),) if macro else _WRAPPERS.get(text[:1], ())
    for opening, closing in pairs:
        if not text.startswith(opening):
            continue
        end = _closing_index(text, len(opening), closing)
        if end < 0:
            continue
        rest = text[end + len(closing) :].lstrip(" \t*_\"'”’`")
        inside = text[len(opening) : end]
        if _stands_alone(rest, opening, inside):
            return inside
    return None


def _stands_alone(rest: str, opening: str, inside: str) -> bool:
    """Returns whether a wrapper is the whole answer, given the text after it. It is in "(Paris).
    The text says so.", and is not in "(A). (B)", "(Paris). London" and "(A)" above "(B)"."""
    if rest[:1] in (".", "!"):
        line = rest[1:].partition("\n")[0].strip(_MARKS)
        if line and (not _is_prose(line) or opening in line):
            return False
    elif rest and (rest[0] not in "\r\n" or rest.lstrip().startswith(opening)):
        return False
    return not taken_back(rest[1:], inside)


def _is_prose(line: str) -> bool:
    """Returns whether at least two words begin with a small letter, unlike in a row of names."""
    return sum(word[0].islower() for word in line.split()) >= 2


def _closing_index(text: str, start: int, closing: str) -> int:
    """Returns where the bracket that was opened before `start` is closed, or -1."""
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


_CHOICE = re.compile(
    r"(?:(?i:option|choice)\s+)?"
    r"(?:[(\[]([A-Za-z])[)\]]"
    r"|([A-Z])(?=[ \t]*(?:$|[).:,;\n]|[-–—]\s|(?:because|since)\b))|([a-z])$)"
)
# Half a pair is enough: "B) or (A". A letter right after a word or a number is no choice: "3(a)".
_BRACKETED = re.compile(r"(?<!\w)(?<![0-9] )[(\[]([A-Za-z])(?!\w)|(?<![\w(\[])([A-Za-z])[)\]]")
# A single letter that punctuation or a linking word joins to the first: "B - A", "B; d", "(B) as
# well as D". In an option's own text a single letter follows a name: "Exhibit A", "John F.".
_ANOTHER = re.compile(
    r"(?:^|[^\w\s'’.(\[]|\.\s|\b(?:or|and|not|nor|no|maybe|perhaps|possibly|then|but|also|is|be|option"
    r"|choice|answer|letter|than|as|to|with|plus|think|say|both|even)\b)[\s(\[]*"
    r"([A-Za-z])(?=[ \t]*(?:$|[)\],;:/&|+\n–—-]|\.(?!\w)))"
)
_CAPITALS = re.compile(r"\b[A-Z]\b")
_HEDGE = re.compile(r"\s*(?:[,;]|(?:and|or|but)\b)")
# An option's own text may begin with these words: "(B) Not disclosed".
_NEGATIVE_OPTION = re.compile(r"[)\]]?[.:]?\s+(?=(?:No|Not|None|Never|Neither|Either)\b)")
_DENIAL = re.compile(
    r"\s*(?:(?:is|are|was|were|do|does|did|has|had|would|wo|ca|could|should|must|might|can|cannot)"
    r"(?:n['’]t)?\b|[^\w]*(?:not|never|nope|or|and|but|maybe|perhaps|possibly|probably)\b"
    r"|[^\w]*(?i:wrong|incorrect|untrue|ruled out|rejected|excluded|eliminated)\b)"
)


# An option's own text either names other options ("(D) Both A and B"), or is the rest of the
# sentence right after the brackets ("(B) The author could not be sure").
_ON_LETTERS = re.compile(
    r"\s+(?:Both|All\s+of|Neither|Either|Only)\s+\(?([A-Z])\)?(?:,\s*\(?([A-Z])\)?)?,?\s+"
    r"(?:and|or|nor|&)\s+\(?([A-Z])\)?\.?\s*"
)
_OPTION_TEXT = re.compile(
    r"\s+(?!(?:Both|All|Neither|Either|Only|Maybe|Perhaps|Possibly|Probably|Actually|Wait|Sorry|No|Not|Or|And|But|However|Hmm)\b)"
    r"[A-Z][a-z]*,?\s[^.!?\n]*"
)


def parse_choice(text: str) -> str | None:
    """Returns the one letter (upper case) that an answer such as "(B)", "B. Paris" or "option B"
    picks, or None if it picks none or several, or if what follows denies or hedges the letter."""
    text = text.strip()
    choice = _CHOICE.match(text)
    if not choice:
        return None
    letter = (choice[1] or choice[2] or choice[3]).upper()
    rest = text[choice.end() :]
    if not rest:
        return letter
    in_brackets = choice[1] is not None
    on_letters = _ON_LETTERS.fullmatch(rest) if in_brackets else None
    if on_letters and letter not in on_letters.groups():
        return letter
    others = {(other[1] or other[2]).upper() for other in _BRACKETED.finditer(rest.lstrip(")]"))}
    others |= {other[1].upper() for other in _ANOTHER.finditer(rest)}
    # After a comma or a linking word every other letter is a choice: "A, I think B".
    if _HEDGE.match(rest):
        others |= set(_CAPITALS.findall(rest)) - {"I"}
    # "(B) Not disclosed" is an option, "(B). Not that." is a denial.
    is_option = not (in_brackets and rest[0] == ".") and _NEGATIVE_OPTION.match(rest)
    behind = "= " + rest[is_option.end() :] if is_option else rest
    own = _OPTION_TEXT.match(rest) if in_brackets else None
    if own and not re.search(r"\b(?:option|choice|answer)\b", own[0], re.IGNORECASE):
        behind = rest[own.end() :]
    if others - {letter} or _DENIAL.match(rest) or taken_back(behind, letter):
        return None
    # "A. Paris B. London": a row of options, in the order of their letters.
    following = re.search(rf"\s{chr(ord(letter) + 1)}[.):]\s", rest)
    return None if following else letter
