"""A dense reward: the F1 score of the answer's words against the gold's (SQuAD's measure).

An answer of which some words are right earns a part. Words that every answer could have ("and")
do not count: they would be learned first, as the cheapest way to a reward. A response without "the
answer is" is compared as a whole, so that its other words cost precision.
"""

import re
from collections import Counter

_FREE = frozenset("a an and or the".split())


def token_f1(gold: str, final: str) -> float:
    """Returns the harmonic mean of precision and recall over words, in [0, 1].

    >>> round(token_f1(gold="north gate", final="Therefore, the answer is (north wall)."), 2)
    0.5
    """
    wanted, given = Counter(_words(gold)), Counter(_words(_stated(final)))
    shared = (wanted & given).total()
    return 2 * shared / (wanted.total() + given.total()) if shared else 0.0


def _stated(final: str) -> str:
    return re.split(r"the answer is", final, flags=re.IGNORECASE)[-1]


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in _FREE]
