"""Text as the rules read it: nothing invisible, one form for each character, one normal form."""

import re
import unicodedata

# Controls that are no white space, soft hyphens, zero-width and direction marks, tags.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\ufeff\U000e0000-\U000e007f]+"
)
_VALUE_CHANGING = ("<super>", "<sub>", "<fraction>", "<circle>")


def strip_invisible(text: str) -> str:
    """Takes out what a reader cannot see. Text order counts: direction marks reverse nothing."""
    return text if text.isprintable() else "".join(_INVISIBLE.split(text))


def fold_width(text: str) -> str:
    """NFKC (full-width forms, ligatures, no-break spaces), except where it changes what is
    written: NFKC makes 52 of 5² and 10 of ⑩. Quadratic at worst: for bounded text only."""
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
# "- 5", "-$5" and "-(5)" are -5. Behind a digit or a letter a dash joins: "3 - 4", "COVID-19".
_SIGN = re.compile(r"([0-9)%]\s*|[^\W\d])?-[\s$€£¥(+]*(?=\.?[0-9])")
_SPACE_BEFORE_PERCENT = re.compile(r"(?<=[0-9])[\s\\]+(?=[%‰‱٪])")
_SPACE_BEHIND_BOUND = re.compile(r"(?:(?<=[<>~=])|(?<=\s!)|(?<=^!))\s+")
# Inside a text a capital A behind a word is a name's part: "Vitamin A deficiency". The mark stands
# for it until the articles are gone.
_CAPITAL_A = re.compile(r"(?<=\w)\s+A(?![\w+#'’-])")
_A_MARK = "\ue000"
# Group 1 stays. Everything else that is punctuation goes.
_PUNCTUATION = re.compile(
    r"((?<![\w)])-(?=\.?[0-9])"  # -3
    r"|(?<![a-z])\.(?=[0-9])"  # 1.5, .5
    r"|(?<=[0-9])%"  # 5%
    r"|(?<=\w)[+#-]+(?![\w+#-])"  # C++, BBB-
    r"|[<>~]=?|[!=/]=|=[!/]=?|(?<!\w)!(?=\w))"  # <5, >=5, ~5, !=5, =/=5, !Paris
    r"|[!-/:-@\[-`{-~]"
)


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces.

    Unlike SQuAD's it never makes different values equal: a minus sign, a decimal point, a percent
    sign, a bound, a negation in characters and a mark after a letter stay (-3, 1.5, 5%, <5, !=5,
    C++, BBB-), and digits are not glued (3:2 is not 32); only thousands separators disappear
    (1,234 and 1 234 567). An article stands before a word, so the last word is none (Vitamin A).
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
