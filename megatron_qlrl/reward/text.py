"""Prepares text for the rules: removes invisible characters, unifies widths, and normalises."""

import re
import unicodedata

# Control characters except white space, soft hyphens, zero-width and direction marks, tags.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\ufeff\U000e0000-\U000e007f]+"
)
_VALUE_CHANGING = ("<super>", "<sub>", "<fraction>", "<circle>")


def strip_invisible(text: str) -> str:
    """Removes characters that a reader cannot see, without changing the order of the others."""
    return text if text.isprintable() else "".join(_INVISIBLE.split(text))


def fold_width(text: str) -> str:
    """Applies NFKC (full-width forms, ligatures, no-break spaces), except to characters whose value
    it would change: NFKC turns 5² into 52 and ⑩ into 10. For short text only: it may take time
    quadratic in the length."""
    if text.isascii():
        return text
    folded = (
        char
        if unicodedata.decomposition(char).startswith(_VALUE_CHANGING)
        else unicodedata.normalize("NFKC", char)
        for char in text
    )
    return unicodedata.normalize("NFC", "".join(folded))


_ARTICLES = frozenset(("a", "an", "the"))
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−֊־᠆〜〰⸺⸻", "-"))
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_SPACED_THOUSANDS = re.compile(r"[0-9]{1,3}(?: [0-9]{3}){2,}")
_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])[^\w\s.<>~]+(?=[0-9])")
# "- 5", "-$5" and "-(5)" are -5. After a digit or a letter a dash joins: "3 - 4", "COVID-19".
_SIGN = re.compile(r"([0-9)%]\s*|[^\W\d])?-[\s$€£¥(+]*(?=\.?[0-9])")
_SPACE_BEFORE_PERCENT = re.compile(r"(?<=[0-9])[\s\\]+(?=[%‰‱٪])")
_SPACE_BEHIND_BOUND = re.compile(r"(?:(?<=[<>~=])|(?<=\s!)|(?<=^!))\s+")
# Inside a text a capital A after a word is part of a name: "Vitamin A deficiency". The mark
# replaces it until the articles are removed.
_CAPITAL_A = re.compile(r"(?<=\w)\s+A(?![\w+#'’-])")
_A_MARK = "\ue000"
# Group 1 is kept; all other punctuation is removed.
_PUNCTUATION = re.compile(
    r"((?<![\w)])-(?=\.?[0-9])"  # -3
    r"|(?<![a-z])\.(?=[0-9])"  # 1.5, .5
    r"|(?<=[0-9])%"  # 5%
    r"|(?<=\w)[+#-]+(?![\w+#-])"  # C++, BBB-
    r"|[<>~]=?|[!=/]=|=[!/]=?|(?<!\w)!(?=\w))"  # <5, >=5, ~5, !=5, =/=5, !Paris
    r"|[!-/:-@\[-`{-~]"
)


def normalize(text: str) -> str:
    """Returns SQuAD's normal form: lower case, no punctuation, no articles, single spaces.

    Unlike SQuAD's it never makes different values equal. It keeps a minus sign, a decimal point, a
    percent sign, a bound, a negation sign and a mark after a letter (-3, 1.5, 5%, <5, !=5, C++,
    BBB-), and does not join digits (3:2 is not 32). It removes only thousands separators (1,234 and
    1 234 567). The last word is never taken for an article (Vitamin A).
    """
    if " A" in text:
        text = _CAPITAL_A.sub(" " + _A_MARK, text)
    text = text.casefold()
    bare = text.replace(" ", "")
    if not bare.isalnum():
        text = _SIGN.sub(_signed, _THOUSANDS.sub("", text.translate(_DASHES)))
        text = _SPACE_BEHIND_BOUND.sub("", _SPACE_BEFORE_PERCENT.sub("", text))
        text = _PUNCTUATION.sub(r"\1", _BETWEEN_DIGITS.sub(" ", text))
        if not text.isascii():
            text = "".join(char for char in text if not _is_foreign_punctuation(char))
    elif _SPACED_THOUSANDS.fullmatch(text):
        return bare
    words = text.split()
    kept = [word for word in words[:-1] if word not in _ARTICLES]
    return " ".join(kept + words[-1:]).replace(_A_MARK, "a")


def _signed(sign: re.Match[str]) -> str:
    return sign[0] if sign[1] else "-"


def _is_foreign_punctuation(char: str) -> bool:
    return not char.isascii() and char not in "‰‱٪" and unicodedata.category(char)[0] == "P"
