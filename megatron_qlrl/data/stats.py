"""Counts what data files hold: rows and lengths by source, and rows that are there twice."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_qlrl.data.dataset import TextRow
from megatron_qlrl.data.words import text_key, words_of

MAX_SHOWN = 10


@dataclass(frozen=True)
class Lengths:
    """Lengths of texts; `median` and `p90` are lengths that occur."""

    mean: float
    median: int
    p90: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths":
        median, p90 = np.quantile(lengths, [0.5, 0.9], method="lower").tolist()
        return cls(float(np.mean(lengths)), int(median), int(p90), max(lengths))


@dataclass(frozen=True)
class Source:
    """Rows of one `data_source`. `responses` is None where no row has one."""

    rows: int
    prompts: Lengths
    responses: Lengths | None


@dataclass
class Stats:
    """What `data_stats` returns.

    Attributes:
        unit: of the lengths, "tokens" or "words".
        sources: by `data_source`, and "all".
        documents: number of different documents; empty ones are not counted.
        same_rows: uids of the rows that have one document, question and response.
        other_golds: those among them whose ground truths differ.
        same_questions: uids of the rows that have one question, whatever their document.
    """

    unit: str
    sources: dict[str, Source]
    documents: int
    same_rows: list[list[str]]
    other_golds: list[list[str]]
    same_questions: list[list[str]]


@dataclass
class _Lengths:
    prompts: list[int] = field(default_factory=list[int])
    responses: list[int] = field(default_factory=list[int])

    def source(self) -> Source:
        responses = Lengths.of(self.responses) if self.responses else None
        return Source(len(self.prompts), Lengths.of(self.prompts), responses)


def data_stats(
    rows: Iterable[TextRow],
    *,
    unit: str = "words",
    prompt_length: Callable[[TextRow], int] | None = None,
    text_length: Callable[[str], int] | None = None,
) -> Stats:
    """Returns the statistics of at least one row. Texts are the same if they differ only in case,
    punctuation and white space.

    Args:
        prompt_length, text_length: lengths of a row's prompt and of a response in `unit`; None
            counts words.
    """
    count = text_length or (lambda text: len(words_of(text)))
    of_prompt = prompt_length or (lambda row: sum(count(m["content"]) for m in row.messages))
    by_source: dict[str, _Lengths] = {}
    whole = _Lengths()
    documents: set[bytes] = set()
    by_row: dict[tuple[bytes, ...], list[tuple[str, str]]] = {}
    by_question: dict[bytes, list[str]] = {}
    for row in rows:
        own = by_source.setdefault(row.data_source, _Lengths())
        length = of_prompt(row)
        for kept in (own, whole):
            kept.prompts.append(length)
        if row.response is not None:
            length = count(row.response)
            for kept in (own, whole):
                kept.responses.append(length)
        parts = [_key(text) for text in (row.document, row.question, row.response or "")]
        if row.document.strip():
            documents.add(parts[0])
        by_row.setdefault(tuple(parts), []).append((row.uid, row.ground_truth.strip()))
        by_question.setdefault(parts[1], []).append(row.uid)
    several = [same for same in by_row.values() if len(same) > 1]
    return Stats(
        unit=unit,
        sources={name: own.source() for name, own in sorted(by_source.items())}
        | {"all": whole.source()},
        documents=len(documents),
        same_rows=[[uid for uid, _ in same] for same in several],
        other_golds=[
            [uid for uid, _ in same] for same in several if len({gold for _, gold in same}) > 1
        ],
        same_questions=[uids for uids in by_question.values() if len(uids) > 1],
    )


def _key(text: str) -> bytes:
    """Returns what identifies a text; one without words is itself."""
    return text_key(words_of(text) or [text.strip()])


def stats_lines(stats: Stats) -> list[str]:
    """Returns the statistics as a table and the rows that are there twice."""
    width = max(len("source"), *map(len, stats.sources)) + 2
    heads = ("mean", "median", "p90", "longest")
    lines = [
        f"{'source':<{width}}{'rows':>8}" + "".join(f"{head:>10}" for head in heads)
        + f"   prompts, in {stats.unit}"
    ]  # fmt: skip
    for name, source in stats.sources.items():
        lines.append(f"{name:<{width}}{source.rows:>8}{_shown(source.prompts)}")
        if source.responses is not None:
            lines.append(f"{'  responses':<{width + 8}}{_shown(source.responses)}")
    rows = stats.sources["all"].rows
    lines.append(f"{stats.documents} different documents in {rows} rows")
    for what, groups in (
        ("rows that are there before (document, question and response)", stats.same_rows),
        ("of these groups have ground truths that differ", stats.other_golds),
        ("rows whose question is asked before", stats.same_questions),
    ):
        extra = sum(len(group) - 1 for group in groups)
        number = len(groups) if groups is stats.other_golds else extra
        lines.append(f"{number} {what}")
        lines += [f"  {' = '.join(group[:MAX_SHOWN])}" for group in groups[:MAX_SHOWN]]
        if len(groups) > MAX_SHOWN:
            lines.append(f"  and {len(groups) - MAX_SHOWN} more groups (--json lists all)")
    return lines


def _shown(lengths: Lengths) -> str:
    numbers = (lengths.mean, lengths.median, lengths.p90, lengths.longest)
    return "".join(f"{number:>10,.0f}" for number in numbers)
