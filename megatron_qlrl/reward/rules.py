r"""Decides by a rule for each data source whether a final answer gives the gold answer.

Rules are strict on purpose: a wrong 1 is trained into the policy, while a judge may correct a wrong
0 (QwenLong-L1 section 3.4: the reward is the maximum of both).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Literal

from megatron_qlrl.errors import DataError
from megatron_qlrl.reward.expressions import evaluate
from megatron_qlrl.reward.extract import (
    MAX_ANSWER_CHARS,
    Answer,
    find_answer,
    parse_choice,
    unwrap,
)
from megatron_qlrl.reward.numeric import Number, parse_number
from megatron_qlrl.reward.text import fold_width, normalize, strip_invisible

RuleName = Literal["qa", "numeric", "choice", "exact", "recite", "custom"]


@dataclass(frozen=True)
class SourceRule:
    """How a data source is scored: its rule, and whether the LLM judge may correct the rule's 0.
    The rule `custom` is the user's own `function` (package.module:function)."""

    rule: RuleName
    judged: bool
    function: str = ""


_QA = SourceRule("qa", judged=True)

RULE_OF_SOURCE: dict[str, SourceRule] = {
    "multihoprag": _QA,
    "musique": _QA,
    "hotpotqa": _QA,
    "2wikimultihopqa": _QA,
    "narrativeqa": _QA,
    "qasper": _QA,
    "frames": _QA,
    "docmath": SourceRule("numeric", judged=True),
    "long_toc_choices": SourceRule("choice", judged=False),
    "toy_docqa": SourceRule("exact", judged=False),
    "mrcr": SourceRule("recite", judged=False),
    "ruler": SourceRule("exact", judged=False),
}
"""How a data source is scored, by a substring of its name in any case; the first match counts."""

RELATIVE_TOLERANCE = 0.0015
# A gold of this form may be a year, where 0.15 % would be three years, so it must be met exactly.
_YEAR = re.compile(r"(?:1[5-9]|2[01])[0-9]{2}(?:\.0*)?")


def with_own_rewards(functions: Mapping[str, str], *, judged: bool) -> dict[str, SourceRule]:
    """Returns the table of rules with the user's functions, by a part of the source's name, before
    the built-in rules. A function's 0 may be corrected by the judge if it is `judged`."""
    own = {name.lower(): SourceRule("custom", judged, f) for name, f in functions.items()}
    return own | {name: rule for name, rule in RULE_OF_SOURCE.items() if name not in own}


def find_rule(
    data_source: str, rules: Mapping[str, SourceRule] = RULE_OF_SOURCE
) -> SourceRule | None:
    """Returns how a data source is scored, or None if no name in `rules` is part of its name."""
    lowered = data_source.lower()
    return next((rule for name, rule in rules.items() if name in lowered or name == "*"), None)


def rule_of(data_source: str, rules: Mapping[str, SourceRule] = RULE_OF_SOURCE) -> SourceRule:
    """Returns how a data source is scored.

    Raises:
        DataError: no name in `rules` is part of `data_source`.
    """
    rule = find_rule(data_source, rules)
    if rule is None:
        raise DataError(
            f"data_source {data_source!r} has no rule; its name must contain one of: "
            f"{', '.join(rules)}"
        )
    return rule


def check_gold(data_source: str, gold: str) -> None:
    """Checks that answers can be scored against this gold.

    Raises:
        DataError: the source has no rule, or its rule needs a letter and the gold names none, or a
            prefix and a text.
    """
    rule = rule_of(data_source).rule
    if rule == "recite" and not all(part.strip() for part in gold.partition("\n")[::2]):
        raise DataError(
            f"the answer {gold[:80]!r} (data_source {data_source!r}) must be the line that a "
            "response starts with, and below it the text that follows"
        )
    if rule == "choice" and parse_choice(_stated(gold)) is None:
        raise DataError(
            f"the answer {gold[:80]!r} to a question of multiple choice (data_source "
            f"{data_source!r}) names no option; give its letter, such as B"
        )


def recitation(gold: str, final: str) -> float | None:
    """Returns how much of the gold's text a response recites (OpenAI MRCR), in [0, 1]: difflib's
    ratio after the prefix, which is the gold's first line. None if the prefix is not there."""
    prefix, _, text = gold.partition("\n")
    final = final.strip()
    if not prefix or not final.startswith(prefix):
        return None
    return SequenceMatcher(None, final.removeprefix(prefix), text).ratio()


def apply_rule(rule: RuleName, *, gold: str, answer: Answer) -> bool:
    """Returns whether `answer` gives `gold`, which may be any text, even a whole sentence. A
    question ("Paris?") gives no answer."""
    if len(answer.text) > MAX_ANSWER_CHARS:
        return False
    gold = _stated(gold)
    return _RULES[rule](answer.text, gold) and ("?" not in answer.text or "?" in gold)


@lru_cache(maxsize=1024)  # the G responses of a group share it
def _stated(gold: str) -> str:
    answer = find_answer(gold)
    if answer:
        return answer.text
    gold = fold_width(strip_invisible(gold))
    return unwrap(gold) or gold


# These words may stand before the gold, in this order, without changing it.
_LEAD = re.compile(r"(?:it (?:is|was) )?(?:(?:in|on|at) )?")
_TITLE = (
    r"(?:(?:former )?(?:mr|mrs|ms|miss|dr|doctor|prof|professor|rev|reverend|sir|dame|president"
    r"|vice president|prime minister|senator|governor|mayor|king|queen|emperor|pope) )"
)
_TITLED_LEAD = re.compile(_LEAD.pattern + _TITLE + "?")
# The gold's title may be left out unless it is an office or part of a name ("President of France",
# "King Kong Lives"); kings and popes are recognised by their number.
_OWN_TITLE = re.compile(
    r"(?!(?:king|queen|emperor|pope) (?!.* [ivx]+$))" + _TITLE + r"(?=\w+ )(?!(?:of|and|general)\b)"
)


def _qa(prediction: str, gold: str) -> bool:
    """Returns whether the normal forms are the same, apart from a short lead ("it was in") and one
    title that either side puts before a name of at least two words ("President Barack Obama").

    No other word is allowed, nor another title ("Mrs. John Smith" is not Mr. John Smith). A test
    for containment could not tell "Paris, France" from a list of candidates "Paris, London", which
    RL learns where it pays; so both are left to the judge, who sees the question.
    """
    wanted, given = normalize(gold), normalize(prediction)
    if not wanted:  # "?" and similar texts have an empty normal form
        return bool(gold.strip()) and gold.strip() == prediction.strip()
    if given == wanted or gold.casefold() == prediction.casefold():
        return True
    has_title = re.match(_TITLE, wanted)
    lead = _TITLED_LEAD if " " in wanted and not has_title else _LEAD
    if _has_lead(given, wanted, lead):
        return True
    untitled = _OWN_TITLE.sub("", wanted, count=1) if _OWN_TITLE.match(wanted) else wanted
    return given == untitled or _has_lead(given, untitled, _LEAD)


def _has_lead(given: str, wanted: str, lead: re.Pattern[str]) -> bool:
    return given.endswith(" " + wanted) and bool(lead.fullmatch(given[: -len(wanted)]))


def _numeric(prediction: str, gold: str) -> bool:
    """Returns whether the numbers are equal within 0.15 % of the gold, or exactly if the gold may
    be a year. The sign counts. A gold without a number must be met word by word."""
    wanted = _number(gold)
    if wanted is None:
        return _exact(prediction, gold)
    given = _number(prediction)
    if given is None:
        return False
    tolerance = 0.0 if _YEAR.fullmatch(gold) else RELATIVE_TOLERANCE
    if given.percent and wanted.percent:
        return _close(given.value, wanted.value, tolerance)
    return any(_close(g, w, tolerance) for g in _readings(given) for w in _readings(wanted))


def _number(text: str) -> Number | None:
    """Returns the number in a plain notation, or else as math-verify reads it."""
    number = parse_number(text)
    if number is None:
        value = evaluate(text)
        number = None if value is None else Number(value)
    return number


def _readings(number: Number) -> tuple[float, ...]:
    """Returns 5 and 0.05 for 5 %, because golds write it both ways, or else the one value."""
    return (number.value, number.value / 100) if number.percent else (number.value,)


def _close(given: float, wanted: float, tolerance: float) -> bool:
    # The last factor keeps a value exactly on the bound inside, despite rounding.
    return abs(given - wanted) <= tolerance * abs(wanted) * (1 + 1e-9)


def _choice(prediction: str, gold: str) -> bool:
    """Returns whether both name the same letter. A gold without one must be met word by word."""
    wanted = parse_choice(gold)
    if wanted is None:
        return _exact(prediction, gold)
    return parse_choice(prediction) == wanted


def _exact(prediction: str, gold: str) -> bool:
    """Returns whether the normal forms are the same. A test for containment would not do: RL on the
    toy task found its loophole within 15 steps ("lemonade. in the cocoa" names two drinks)."""
    return normalize(prediction) == normalize(gold) != ""


_RULES: dict[RuleName, Callable[[str, str], bool]] = {
    "qa": _qa,
    "numeric": _numeric,
    "choice": _choice,
    "exact": _exact,
}
