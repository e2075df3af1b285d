"""Text as the rules read it: nothing invisible, one form for each character, one normal form."""

import re
import unicodedata

# Controls that are no white space, soft hyphens, zero-width and direction marks, tags.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)
_VALUE_CHANGING = ("<super>", "<sub>", "<fraction>", "<circle>")


def strip_invisible(text: str) -> str:
    """Takes out what a reader cannot see. Text order counts: direction marks reverse nothing."""
    return text if text.isprintable() else _INVISIBLE.sub("", text)


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
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−", "-"))
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])[^\w\s.]+(?=[0-9])")
# Group 1 stays. Everything else that is punctuation goes.
_PUNCTUATION = re.compile(
    r"((?<![\w)])-(?=\.?[0-9])"  # -3
    r"|(?<![a-z])\.(?=[0-9])"  # 1.5, .5
    r"|(?<=[0-9])%"  # 5%
    r"|(?<=\w)[+#-]+(?![\w+#-]))"  # C++, BBB-
    r"|[!-/:-@\[-`{-~]"
)


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces.

    Unlike SQuAD's it never makes different values equal: a minus sign, a decimal point, a percent
    sign and a mark after a letter stay (-3, 1.5, 5%, C++, BBB-), and digits are not glued (3:2 is
    not 32); only a thousands separator disappears.
    """
    text = text.casefold()
    if not text.replace(" ", "").isalnum():
        text = _THOUSANDS.sub("", text.translate(_DASHES))
        text = _PUNCTUATION.sub(r"\1", _BETWEEN_DIGITS.sub(" ", text))
        if not text.isascii():
            text = "".join(char for char in text if not _is_foreign_punctuation(char))
    return " ".join([word for word in text.split() if word not in _ARTICLES])


def _is_foreign_punctuation(char: str) -> bool:
    return not char.isascii() and unicodedata.category(char)[0] == "P"
