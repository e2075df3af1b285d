"""Words of texts and what identifies texts by them, for duplicates and overlaps."""

import re
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

# A run of letters and digits, or a single character of a script that puts no spaces between words.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of an n-gram loses its weight


def words_of(text: str) -> list[str]:
    """Returns the words without case, punctuation and white space."""
    return _WORD.findall(text.casefold())


def text_key(words: Sequence[str]) -> bytes:
    """Returns what two texts share exactly if their words are the same, in the same order."""
    return blake2b(" ".join(words).encode("utf-8", "replace"), digest_size=16).digest()


def ngram_hashes(words: Sequence[str], n: int) -> np.ndarray:
    """Returns the distinct n-grams of a text as sorted hashes (uint64 [N]), the same in every
    process; none where the text has fewer than `n` words."""
    if len(words) < n:
        return np.zeros(0, np.uint64)
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(words))}
    digests = b"".join(
        blake2b(word.encode("utf-8", "replace"), digest_size=8).digest() for word in vocabulary
    )
    values = np.frombuffer(digests, "<u8")[[vocabulary[word] for word in words]]
    grams = np.zeros(len(words) - n + 1, np.uint64)
    for offset in range(n):
        grams = grams * _BASE + values[offset : offset + len(grams)]
    # Mixed (the finisher of splitmix64), because a sample is taken by the lowest bits.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        grams = (grams ^ (grams >> np.uint64(shift))) * np.uint64(factor)
    return np.unique(grams ^ (grams >> np.uint64(31)))
