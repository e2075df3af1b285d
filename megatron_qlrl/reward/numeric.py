"""Reads one number in the notations that people write."""

import math
import re
from dataclasses import dataclass

from megatron_qlrl.reward.doubt import denies
from megatron_qlrl.reward.extract import unwrap


@dataclass(frozen=True, slots=True)
class Number:
    """A number with its scale word applied. If it was written as a percentage, `percent` is set and
    `value` is the number before the sign."""

    value: float
    percent: bool = False


# The most frequent forms, six times as fast as the whole notation.
_PLAIN = re.compile(r"-?\$?(?:[0-9]{1,15}|[0-9]{1,3}(?:,[0-9]{3}){1,4})(?:\.[0-9]{1,15})?")
_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
# These count only with a currency: "1.5 m" without one may be metres.
_MONEY_SCALES = (
    {"k": 1e3}
    | dict.fromkeys(("m", "mm", "mn", "mln"), 1e6)
    | dict.fromkeys(("b", "bn"), 1e9)
    | dict.fromkeys(("t", "tn"), 1e12)
)
_SAME_CHARS = str.maketrans({"−": "-", "–": "-", "‐": "-"})
_LATEX_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!|\\,)(?=[0-9]{3})")
_LATEX_SPACE = re.compile(r"\\[,!;: ]|(?<=\w)~(?=\w)")
_MATH = re.compile(r"\$([^$]*)\$")
_TEXT_MACRO = re.compile(r"\\(?:text|textbf|mathrm)\s*\{([^{}]*)\}")
_SEVERAL = re.compile(r",\s|[;\n]|(?<=[0-9])[.!]\s|\b(?:or|and|not)\b")
# One sign on its own: "=/=", "/=", "~=", "+=" and "=>" are no equations.
_EQUALS = re.compile(r"(?<![<>!=/~?+*^|&\\-])=(?!\\?[=/<>!~?])|≈|\\approx\b")
_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_SPACED_DIGITS = r"[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]*)?"
_NUMBER = re.compile(
    r"(?:(?:approximately|approx\.?|about|around|roughly|nearly)\s+|~\s*)?"
    r"(?P<sign>[-+]|(?:minus|negative)\s)?\s*"
    r"(?P<currency>us\s?\$|usd|eur|gbp|\$|€|£|¥)?\s*(?P<inner_sign>[-+])?\s*"
    rf"(?P<digits>{_SPACED_DIGITS}|{_DIGITS})(?P<exponent>e[-+]?[0-9]{{1,3}})?"
    rf"(?:\s*/\s*(?P<denominator>{_DIGITS}))?"
    r"(?:\s*(?P<percent>%|percent\b|per\s+cent\b)"
    r"|\s*(?P<scale>thousand|million|billion|trillion)s?\b"
    rf"|\s?(?P<letters>{'|'.join(_MONEY_SCALES)})\b)?"
    r"(?P<unit>(?:\s+[a-z]+){0,6})"
)
_CURRENCIES = frozenset(
    "dollar dollars usd us euro euros eur pound pounds gbp sterling yen jpy yuan rmb franc francs "
    "chf rupees inr won pesos".split()
)
# These words may follow a number without changing its value, its sign or its truth. Any other word
# may change it ("5 dozens", "5 losses", "5 at most"), so the judge decides, who sees the question.
_UNITS = _CURRENCIES | frozenset(
    "of per in for the a an each total net annual annually year years yr yrs months "
    "weeks days hours minutes seconds share shares common stock stocks options units unit people "
    "person persons employee employees customers users members stores contracts items orders "
    "votes points percentage revenue revenues sales income assets liabilities equity cash earnings "
    "profit profits operating capital taxes expenses interest costs cost increase growth gain "
    "gains rise canadian australian american square feet foot miles meters metres kilometers "
    "kilometres acres barrels gallons tons tonnes megawatts kilograms grams children games "
    "goals students countries companies states cities books films episodes seasons".split()
)
_LINKS = frozenset("of per in for the a an".split())  # no unit ends with these words
_MAX_NUMBER_CHARS = 120


def parse_number(text: str) -> Number | None:
    """Returns the number if the text is one number and nothing else, or None.

    It reads a sign in front, a currency, thousands separators, decimals, an exponent, a simple
    fraction, a percent sign or word, one scale word (thousand to trillion) or letter of money
    ($1.5M), a unit in words, LaTeX spacing, and the right side of an equation. Brackets do not
    negate, because prompts ask for them.
    """
    if _PLAIN.fullmatch(text):
        return Number(float(text.replace(",", "").replace("$", "")))
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    match = _NUMBER.fullmatch(text.lower()) or _NUMBER.fullmatch(bare_form(text))
    if not match or (match["sign"] and match["inner_sign"]):
        return None
    unit = match["unit"].split()
    is_money = match["currency"] or (unit and unit[0] in _CURRENCIES)
    if not _UNITS.issuperset(unit) or (unit and unit[-1] in _LINKS):
        return None
    if match["letters"] and not is_money:
        return None
    value = float(match["digits"].replace(",", "").replace(" ", "") + (match["exponent"] or ""))
    if match["denominator"]:
        denominator = float(match["denominator"].replace(",", ""))
        value = value / denominator if denominator else math.inf
    value *= _SCALES.get(match["scale"], 1.0) * _MONEY_SCALES.get(match["letters"], 1.0)
    if math.isinf(value):
        return None
    negative = (match["sign"] or match["inner_sign"] or "")[:1] in ("-", "m", "n")
    return Number(-value if value and negative else value, percent=bool(match["percent"]))


def bare_form(text: str) -> str:
    """Returns the right side of an equation, or the whole text, in lower case and without LaTeX
    spacing and text macros; "" if the text states several things or denies the equation."""
    text = _LATEX_THOUSANDS.sub(",", text.translate(_SAME_CHARS).lower())
    if "\\" in text or "~" in text:
        text = _LATEX_SPACE.sub(" ", _TEXT_MACRO.sub(r" \1", text))
        text = text.replace("\\%", "%").replace("\\$", "$")
    text = _MATH.sub(r" \1 ", text)
    if _SEVERAL.search(text):
        return ""
    *lefts, text = _EQUALS.split(text)
    if any(denies(left) for left in lefts):  # "anything except x = 5"
        return ""
    text = text.strip()
    return text if text.startswith("(") else unwrap(text)
