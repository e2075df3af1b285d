"""Says which rows of a held-out file occur in a training file, exactly or in part.

    held-out rows -> index of their n-grams (a bounded sample) <- n-grams of each training row

Texts are compared without case, punctuation and white space. Two texts overlap by the share of the
shorter one's distinct n-grams that the other has (the overlap coefficient). Only the index and the
row group that is read are in memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from megatron_qlrl.data.dataset import TextRow
from megatron_qlrl.data.words import ngram_hashes, text_key, words_of

MAX_NGRAMS_OF_TEXT = 4096
"""A longer text is represented by a sample of between half as many n-grams and this number."""
MAX_NGRAMS = 2**23
"""The n-grams of all held-out texts together; each takes 12 bytes."""
LEVELS = (0.1, 0.5, 0.9)
"""Shares at which texts are counted."""
MAX_SHOWN = 10


@dataclass(frozen=True)
class Pair:
    """A held-out row and the training row that it has most in common with."""

    eval_row: str
    train_row: str
    share: float


@dataclass(frozen=True)
class Overlap:
    """One kind of text, documents or questions.

    Attributes:
        rows: held-out rows.
        texts: their different texts; empty ones are not counted.
        sampled: those among them whose n-grams were sampled, so that their share is an estimate.
        exact: held-out rows whose text is in training, with the first training row that has it.
        ngram: other held-out rows whose text shares at least the threshold.
        levels: held-out rows, the exact ones among them, by the share that they reach.
    """

    rows: int
    texts: int
    sampled: int
    exact: list[Pair]
    ngram: list[Pair]
    levels: dict[str, int]


def data_overlap(
    train: Callable[[], Iterable[TextRow]],
    held_out: Callable[[], Iterable[TextRow]],
    *,
    ngrams: dict[str, int],
    threshold: float,
) -> dict[str, Overlap]:
    """Returns the overlap of documents and of questions.

    Args:
        train, held_out: each call yields the rows anew; held-out rows are read twice.
        ngrams: words of an n-gram for "document" and "question".
        threshold: the share from which a pair is listed.
    """
    num_rows = sum(1 for _ in held_out())
    most = min(MAX_NGRAMS_OF_TEXT, max(64, MAX_NGRAMS // (len(ngrams) * max(num_rows, 1))))
    indices = {kind: _Index(n, most) for kind, n in ngrams.items()}
    for row in held_out():
        for kind, index in indices.items():
            index.add(row.uid, getattr(row, kind))
    for row in train():
        for kind, index in indices.items():
            index.compare(row.uid, getattr(row, kind))
    return {kind: index.result(threshold, num_rows) for kind, index in indices.items()}


class _Index:
    """The n-grams of the held-out texts of one kind, and for each text its best match so far."""

    def __init__(self, n: int, most: int) -> None:
        self._n, self._most = n, most
        self._texts: dict[bytes, int] = {}
        self._rows: list[list[str]] = []
        self._samples: list[np.ndarray] = []
        self._sizes: list[int] = []  # distinct n-grams of each text, sampled or not
        self._exact: dict[int, str] = {}
        self._best: dict[int, tuple[float, str]] = {}
        self._seen: set[bytes] = set()
        self._joined: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, uid: str, text: str) -> None:
        words = words_of(text)
        if not words:
            return
        place = self._texts.setdefault(text_key(words), len(self._rows))
        if place < len(self._rows):
            self._rows[place].append(uid)
            return
        hashes = ngram_hashes(words, self._n)
        self._rows.append([uid])
        self._sizes.append(len(hashes))
        self._samples.append(_sample(hashes, self._most))

    def compare(self, uid: str, text: str) -> None:
        words = words_of(text)
        key = text_key(words)
        if not words or key in self._seen:
            return
        self._seen.add(key)
        if key in self._texts:
            self._exact[self._texts[key]] = uid
        hashes = ngram_hashes(words, self._n)
        known, owners = self._join()
        if not len(hashes) or not len(known):
            return
        starts, ends = (np.searchsorted(known, hashes, side) for side in ("left", "right"))
        hits = starts < ends
        shared = [owners[a:b] for a, b in zip(starts[hits], ends[hits], strict=True)]
        if not shared:
            return
        counts = np.bincount(np.concatenate(shared), minlength=len(self._rows))
        for place in np.flatnonzero(counts).tolist():
            part = counts[place] / len(self._samples[place])
            share = min(1.0, part * max(1.0, self._sizes[place] / len(hashes)))
            if share > self._best.get(place, (0.0, ""))[0]:
                self._best[place] = (float(share), uid)

    def _join(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns all n-grams, sorted, and the text that each belongs to."""
        if self._joined is None:
            hashes = np.concatenate([np.zeros(0, np.uint64), *self._samples])
            lengths = [len(sample) for sample in self._samples]
            owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
            order = np.argsort(hashes, kind="stable")
            self._joined = hashes[order], owners[order]
        return self._joined

    def result(self, threshold: float, num_rows: int) -> Overlap:
        exact = self._pairs({place: (1.0, uid) for place, uid in self._exact.items()})
        others = {p: best for p, best in self._best.items() if p not in self._exact}
        ngram = self._pairs({p: best for p, best in others.items() if best[0] >= threshold})
        levels = {
            f"{level:g}": len(exact)
            + sum(len(self._rows[p]) for p, (share, _) in others.items() if share >= level)
            for level in LEVELS
        }
        sampled = sum(
            len(sample) < size for sample, size in zip(self._samples, self._sizes, strict=True)
        )
        return Overlap(num_rows, len(self._rows), sampled, exact, ngram, levels)

    def _pairs(self, matches: dict[int, tuple[float, str]]) -> list[Pair]:
        ordered = sorted(matches.items(), key=lambda item: (-item[1][0], item[0]))
        return [
            Pair(row, uid, round(share, 4))
            for place, (share, uid) in ordered
            for row in self._rows[place]
        ]


def _sample(hashes: np.ndarray, most: int) -> np.ndarray:
    """Returns at most `most` of the hashes: those divisible by a power of two. Whether an n-gram
    is taken hangs on the n-gram alone, so the share found is that of the whole without bias."""
    step = 1
    while len(hashes) > most:
        step *= 2
        hashes = hashes[hashes % np.uint64(step) == 0]
    return hashes


def overlap_lines(overlaps: dict[str, Overlap], *, threshold: float) -> list[str]:
    """Returns a table of the counts, then the pairs."""
    lines = [f"{'':<12}{'exact':>8}" + "".join(f"{f'>= {level:.0%}':>10}" for level in LEVELS)]
    rows = max(overlap.rows for overlap in overlaps.values())
    lines[0] += f"   of {rows} rows, by the n-grams shared with one training row"
    for kind, overlap in overlaps.items():
        counts = "".join(f"{overlap.levels[f'{level:g}']:>10}" for level in LEVELS)
        note = f"   {overlap.sampled} texts sampled" if overlap.sampled else ""
        lines.append(f"{kind + 's':<12}{len(overlap.exact):>8}{counts}{note}")
    for kind, overlap in overlaps.items():
        for what, pairs in (
            ("the same", overlap.exact),
            (f"at least {threshold:.0%} shared", overlap.ngram),
        ):
            if pairs:
                lines.append(f"{kind}s, {what}:")
            lines += [f"  {p.eval_row} ~ {p.train_row}  {p.share:.1%}" for p in pairs[:MAX_SHOWN]]
            if len(pairs) > MAX_SHOWN:
                lines.append(f"  and {len(pairs) - MAX_SHOWN} more (--json lists all)")
    return lines
