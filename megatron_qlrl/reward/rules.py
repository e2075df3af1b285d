"""The rule of each data source: does the final text of a response give the gold answer?

Rules are strict on purpose: a wrong 1 is trained into the policy, while a wrong 0 is what a
judge may mend (QwenLong-L1 section 3.4: the reward is the maximum of both).
"""

import re
import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_qlrl.errors import DataError
from megatron_qlrl.reward.extract import (
    Answer,
    Number,
    find_answer,
    parse_choice,
    parse_number,
    unwrap,
)

RuleName = Literal["qa", "numeric", "choice", "exact"]


@dataclass(frozen=True)
class SourceRule:
    """How a data source is scored: its rule, and whether an LLM judge may mend the rule's 0."""

    rule: RuleName
    judged: bool


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
}
"""Substring of `data_source` (any case) -> how it is scored; the first that fits."""

RELATIVE_TOLERANCE = 0.0015


def rule_of(data_source: str) -> SourceRule:
    """How a data source is scored.

    Raises:
        DataError: no known name is part of `data_source`.
    """
    lowered = data_source.lower()
    for name, source_rule in RULE_OF_SOURCE.items():
        if name in lowered:
            return source_rule
    raise DataError(
        f"data_source {data_source!r} has no rule; its name must contain one of: "
        f"{', '.join(RULE_OF_SOURCE)}"
    )


def apply_rule(rule: RuleName, *, gold: str, answer: Answer) -> bool:
    """True when `answer` gives `gold`. Any gold text is accepted, a whole sentence too."""
    stated = find_answer(gold)
    return _RULES[rule](answer.text, stated.text if stated else unwrap(gold) or gold)


def _qa(prediction: str, gold: str) -> bool:
    """The gold's tokens stand in the prediction, in order and side by side.

    The prediction may be at most 2 * gold + 1 tokens long and may neither list nor negate when the
    gold does not: a list of all candidates is no answer. What is left open is a bare row of two or
    three candidates, which containment cannot tell from "Paris, France".
    """
    wanted, given = normalize(gold).split(), normalize(prediction).split()
    if not wanted:  # "The", "?" and the like normalise to nothing
        return bool(gold.strip()) and gold.strip().casefold() == prediction.strip().casefold()
    if len(given) > 2 * len(wanted) + 1:
        return False
    if _lists_more(prediction, gold) or _negates(given, wanted):
        return False
    size = len(wanted)
    return any(given[i : i + size] == wanted for i in range(len(given) - size + 1))


_LIST_MARK = re.compile(r"\b(?:or|and)\b|[&/;|\n]", re.IGNORECASE)
_LIST_COMMA = re.compile(r",\s")
_NEGATIONS = frozenset(
    ("not", "no", "nor", "neither", "never", "none", "cannot", "isnt", "wasnt", "arent", "werent")
)


def _lists_more(prediction: str, gold: str) -> bool:
    more_commas = len(_LIST_COMMA.findall(prediction)) - len(_LIST_COMMA.findall(gold))
    # One comma more is an apposition ("Paris, France"); two are a list.
    return more_commas >= 2 or bool(_LIST_MARK.search(prediction) and not _LIST_MARK.search(gold))


def _negates(given: list[str], wanted: list[str]) -> bool:
    if _NEGATIONS & set(wanted):
        return "yes" in given and "yes" not in wanted
    return bool(_NEGATIONS & set(given))


def _numeric(prediction: str, gold: str) -> bool:
    """Equal within 0.15 % of the gold; the sign counts. A gold without a number must be met
    word by word."""
    wanted = parse_number(gold)
    if wanted is None:
        return _exact(prediction, gold)
    given = parse_number(prediction)
    if given is None:
        return False
    if given.percent and wanted.percent:
        return _close(given.value, wanted.value)
    return any(_close(g, w) for g in _readings(given) for w in _readings(wanted))


def _readings(number: Number) -> tuple[float, ...]:
    """Golds write 5 % as 5 and as 0.05; a written percent sign allows both, and only that."""
    return (number.value, number.value / 100) if number.percent else (number.value,)


def _close(given: float, wanted: float) -> bool:
    # The last factor keeps a value exactly on the bound inside, whatever the rounding.
    return abs(given - wanted) <= RELATIVE_TOLERANCE * abs(wanted) * (1 + 1e-9)


def _choice(prediction: str, gold: str) -> bool:
    """The same letter. A gold without a letter must be met word by word."""
    wanted = parse_choice(gold)
    if wanted is None:
        return _exact(prediction, gold)
    return parse_choice(prediction) == wanted


def _exact(prediction: str, gold: str) -> bool:
    """The normal forms are the same. For one-word golds: RL on the toy task found containment's
    loophole within 15 steps ("lemonade. in the cocoa" names two drinks, one of them right)."""
    return normalize(prediction) == normalize(gold) != ""


_RULES: dict[RuleName, Callable[[str, str], bool]] = {
    "qa": _qa,
    "numeric": _numeric,
    "choice": _choice,
    "exact": _exact,
}

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NUMERIC_MARK = re.compile(r"(?<=[0-9])\.(?=[0-9])|(?<![\w)])-(?=\.?[0-9])")


def normalize(text: str) -> str:
    """SQuAD's normal form (lower case, no punctuation, no articles, single spaces), except that
    a decimal point and a minus sign stay: 1.5 is not 15, -3 is not 3."""
    text = unicodedata.normalize("NFC", text).casefold().replace("−", "-")
    keep = {match.start() for match in _NUMERIC_MARK.finditer(text)}
    kept = "".join(
        char
        for index, char in enumerate(text)
        if index in keep or unicodedata.category(char)[0] != "P" and char not in string.punctuation
    )
    return " ".join(_ARTICLES.sub(" ", kept).split())
