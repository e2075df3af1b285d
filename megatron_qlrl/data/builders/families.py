"""Builds training files of the families of DocQA-RL-1.6K (QwenLong-L1 section 4.1) from raw parts.

`FAMILIES` says how each is read. Questions over several documents get distractors: texts that other
questions need, drawn by a seed and mixed with their own.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from megatron_qlrl.data.builders.benchmarks import docmath_item
from megatron_qlrl.data.builders.items import Item, read_records, text_of, write_items
from megatron_qlrl.errors import DataError

# Questions with where they stand, for the source, the number of distractors and the seed.
Read = Callable[[Path, int, int], Iterator[tuple[str, Item]]]


@dataclass(frozen=True)
class Family:
    """How raw files become rows; `data_source` selects the reward's rule."""

    read: Read
    data_source: str


def build_family(
    name: str,
    source: Path,
    out: Path,
    *,
    distractors: int,
    seed: int,
    split: str,
    check_gold: Callable[[str, str], None],
) -> int:
    """Writes the family's rows to `out` (parquet) and returns their number.

    Args:
        name: one of `FAMILIES`.
        source: the raw file, or the folder that holds the raw files.
        distractors: texts of other questions in each document, for questions over several.
        split: written to `extra_info.split`.
        check_gold: raises DataError for a (`data_source`, answer) that no rule can score.

    Raises:
        DataError: a file or a row cannot be used. The message names both.
        ConfigError: `out` cannot be written, or is one of the inputs.
    """
    family = FAMILIES[name]
    return write_items(
        name,
        family.read(source, distractors, seed),
        out,
        data_source=family.data_source,
        split=split,
        source=source,
        check_gold=check_gold,
    )


def _musique(source: Path, distractors: int, seed: int) -> Iterator[tuple[str, Item]]:
    """MuSiQue's own paragraphs hold distractors already; unanswerable questions are left out."""
    names = [f"musique_ans_v1.0_{split}.jsonl" for split in ("train", "dev")]
    questions = [
        (where, record, _paragraphs(where, record))
        for where, record in read_records(source, *names)
        if record.get("answerable", True) is True
    ]
    pool = list(dict.fromkeys(text for _, _, own in questions for text in own))
    for where, record, own in questions:
        name = text_of(where, record, "id")
        yield (
            where,
            Item(
                question=text_of(where, record, "question"),
                document=_mixed(where, own, pool, distractors, f"{seed}:{name}"),
                gold=text_of(where, record, "answer"),
                kind="qa",
                extra={"id": name},
            ),
        )


def _paragraphs(where: str, record: dict[str, Any]) -> list[str]:
    paragraphs = record.get("paragraphs")
    if not isinstance(paragraphs, list) or not paragraphs:
        raise DataError(f"{where}: `paragraphs` must be a list of {{title, paragraph_text}}")
    return [f"{text_of(where, p, 'title')}\n{text_of(where, p, 'paragraph_text')}"
            for p in paragraphs]  # fmt: skip


def _multihoprag(source: Path, distractors: int, seed: int) -> Iterator[tuple[str, Item]]:
    """A question's document holds the articles that its evidence names."""
    if not source.is_dir():
        raise DataError(f"{source}: pass the folder with MultiHopRAG.json and corpus.json")
    articles = dict(
        (text_of(where, record, "url"), _article(where, record))
        for where, record in read_records(source, "corpus.json")
    )
    pool = list(articles.values())
    for number, (where, record) in enumerate(read_records(source, "MultiHopRAG.json")):
        evidence = record.get("evidence_list")
        if not isinstance(evidence, list):
            raise DataError(f"{where}: `evidence_list` must be a list of {{url}}")
        urls = list(dict.fromkeys(text_of(where, each, "url") for each in evidence))
        if missing := [url for url in urls if url not in articles]:
            raise DataError(f"{where}: corpus.json has no article {missing[0]}")
        own = [articles[url] for url in urls]
        yield (
            where,
            Item(
                question=text_of(where, record, "query"),
                document=_mixed(where, own, pool, distractors, f"{seed}:{number}"),
                gold=text_of(where, record, "answer"),
                kind="qa",
                extra={"question_type": text_of(where, record, "question_type")},
            ),
        )


def _article(where: str, record: dict[str, Any]) -> str:
    """Returns an article with what questions call it by: its publisher and date."""
    title, publisher, published, body = (
        text_of(where, record, key).strip() for key in ("title", "source", "published_at", "body")
    )
    return f"{title}\n{publisher}, {published}\n{body}"


def _mixed(where: str, own: Sequence[str], pool: Sequence[str], count: int, seed: str) -> str:
    """Returns the texts of a question and up to `count` of the pool's others, in random order;
    without others the texts keep their order."""
    rng = random.Random(seed)
    known = set(own)
    # Some of the draw may be the question's own, so that many more are drawn.
    drawn = rng.sample(range(len(pool)), min(count + len(known), len(pool)))
    others = [pool[i] for i in drawn if pool[i] not in known][:count]
    texts = [*own, *others]
    if not texts:
        raise DataError(f"{where}: the question has no text of its own; ask for distractors")
    if others:
        rng.shuffle(texts)
    return "\n\n".join(text.strip() for text in texts)


def _docmath(source: Path, distractors: int, seed: int) -> Iterator[tuple[str, Item]]:
    for where, record in read_records(source, "train.jsonl", "train.json"):
        yield where, docmath_item(where, record)


def _choice(source: Path, distractors: int, seed: int) -> Iterator[tuple[str, Item]]:
    for where, record in read_records(source, "train.jsonl", "train.json"):
        options = _options(where, record)
        gold = text_of(where, record, "answer").strip()
        if gold not in options:
            raise DataError(
                f"{where}: `answer` must be one of {', '.join(options)}, found {gold[:40]!r}"
            )
        shown = [f"({letter}) {option.strip()}" for letter, option in options.items()]
        question = text_of(where, record, "question").strip()
        yield (
            where,
            Item(
                question="\n".join([question, "", *shown]),
                document=text_of(where, record, "document"),
                gold=gold,
                kind="choice",
            ),
        )


def _options(where: str, record: dict[str, Any]) -> dict[str, str]:
    """Returns the options by letter."""
    options = record.get("options")
    if isinstance(options, list) and len(options) <= len(ascii_uppercase):
        options = dict(zip(ascii_uppercase, options, strict=False))
    letters = list(options) if isinstance(options, dict) else []
    if not len(letters) >= 2 or letters != list(ascii_uppercase[: len(letters)]):
        raise DataError(
            f"{where}: `options` must be a list of two to 26 texts, or an object with the keys A, "
            "B, ..."
        )
    return {letter: text_of(where, options, letter) for letter in letters}


FAMILIES: dict[str, Family] = {
    "musique": Family(_musique, "musique"),
    "multihoprag": Family(_multihoprag, "multihoprag"),
    "docmath": Family(_docmath, "docmath"),
    "choice": Family(_choice, "long_toc_choices"),
}
"""Every family by name; no other is known."""
