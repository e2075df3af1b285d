"""Builds synthetic tasks of any length, after the task families of RULER (arXiv 2404.06654).

* `niah`: numbers of four things are hidden in filler sentences; one of them is asked for.
* `vt`: variables are set and copied along two chains; all names that hold one value are asked for.
* `cwe`: ten words of a long list occur most often; these are asked for.
* `fwe`: frequencies of made-up words fall off; the three most frequent are asked for.
* `qa`: what one of many invented people owns is asked for.

Words and sentences are this file's own. Answers that are lists have an order, which the question
states, so that the rule can compare them as one text.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal

from megatron_qlrl.data.builders.rows import write_rows
from megatron_qlrl.data.template import docqa_message
from megatron_qlrl.errors import ConfigError

RulerTask = Literal["niah", "vt", "cwe", "fwe", "qa"]
SLACK = 0.01
"""A prompt is at most this share shorter than the wanted number of tokens, or one piece of text."""

_ADJECTIVES = (
    "amber bitter brisk calm clever coarse crisp dusty eager faint fierce frosty gentle golden "
    "grave hollow humble icy jolly keen lively mellow misty narrow noble pale patient plain quiet "
    "rapid ripe rough rusty shallow sharp silent slender smooth solemn steady stern sturdy sunny "
    "tender tidy vivid warm weary wild young"
).split()
_NOUNS = (
    "anchor barrel basket beacon bridge candle canyon carpet castle cellar chapel cliff cottage "
    "creek curtain desert engine feather fence forest fountain garden glacier hammer harbour "
    "island kettle ladder lantern marble meadow mirror mountain orchard palace pebble pillow "
    "quarry ribbon river saddle shelter spindle tavern temple timber tunnel valley wagon window"
).split()
_TRADES = "baker brewer carver cooper dyer farrier glazier mason miller potter smith tanner".split()
_SYLLABLES = "ba ce di fo gu ha ki lo mu ne pa ri so tu va we xi yo za cha dre plo stu kri".split()
_FILLER = (
    "The {} {} stood in the same place for many years.",
    "Nobody in the village remembered who had made the {} {}.",
    "From the far side of the square it looked like a {} {}.",
    "People used to say that a {} {} brings luck.",
    "They walked past the {} {} and went home.",
)


def build_ruler(
    out: Path, *, task: RulerTask, tokens: int, num: int, seed: int, count: Callable[[str], int]
) -> int:
    """Writes `num` questions (parquet) and returns the largest number of tokens of a prompt.

    Args:
        tokens: a prompt has no more, and at most `SLACK` less.
        count: returns the number of tokens of the prompt that holds this user message.

    Raises:
        ConfigError: `tokens` is too small for the task, or `out` cannot be written.
    """
    rows = [_row(task, tokens, f"{seed}:{index}", index, count) for index in range(num)]
    write_rows(out, rows, inputs=[])
    return max(row["extra_info"]["tokens"] for row in rows)


def _row(
    task: RulerTask, tokens: int, seed: str, index: int, count: Callable[[str], int]
) -> dict[str, Any]:
    def make(size: int) -> tuple[str, str, str, str, int]:
        document, question, gold = _TASKS[task](Random(f"{task}:{seed}"), size, tokens)
        message = docqa_message(document=document, question=question, kind="qa")
        return document, question, gold, message, count(message)

    fits, over = 1, 0  # sizes: the largest known to fit, the smallest known not to (0: none)
    best = make(fits)
    if best[-1] > tokens:
        raise ConfigError(
            f"--tokens {tokens} is too small for {task}, whose shortest prompt has {best[-1]}"
        )
    slope = 0.0  # tokens for each unit of size; 0: not known yet
    while over != fits + 1 and best[-1] < tokens * (1 - SLACK):
        size = fits + max(1, int((tokens - best[-1]) / slope)) if slope else 2 * fits
        if over and size >= over:
            size = (fits + over) // 2
        tried = make(size)
        slope = (tried[-1] - best[-1]) / (size - fits) if tried[-1] > best[-1] else 0.0
        if tried[-1] <= tokens:
            fits, best = size, tried
        else:
            over = size
    document, question, gold, message, length = best
    return {
        "data_source": f"ruler_{task}",
        "prompt": [{"role": "user", "content": message}],
        "ability": "docqa",
        "reward_model": {"style": "rule", "ground_truth": gold},
        "extra_info": {"split": "test", "index": index, "task": task, "tokens": length},
        "document": document,
        "question": question,
    }


def _niah(rng: Random, size: int, _: int) -> tuple[str, str, str]:
    things = rng.sample([f"{a} {n}" for a in _ADJECTIVES for n in _NOUNS], 4)
    numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), 4)]
    needles = [f"The number of the {t} is {n}." for t, n in zip(things, numbers, strict=True)]
    asked = rng.randrange(4)
    question = f"What is the number of the {things[asked]}?"
    return _scattered(rng, size, needles), question, numbers[asked]


def _vt(rng: Random, size: int, _: int) -> tuple[str, str, str]:
    names = ["".join(word).upper() for word in _words(rng, 10, 2)]
    values = rng.sample(range(10_000, 100_000), 2)
    chains = (names[:5], names[5:])
    lines = [
        [f"VAR {chain[0]} = {value}."]
        + [f"VAR {new} = VAR {old}." for old, new in zip(chain, chain[1:], strict=False)]
        for chain, value in zip(chains, values, strict=True)
    ]
    order = rng.sample([0] * 5 + [1] * 5, 10)
    needles = [lines[chain].pop(0) for chain in order]
    question = (
        f"Which five variables hold the value {values[0]}, directly or as a copy of another "
        "variable? Give them in the order in which the text sets them, separated by commas."
    )
    return _scattered(rng, size, needles), question, ", ".join(chains[0])


def _cwe(rng: Random, size: int, tokens: int) -> tuple[str, str, str]:
    words = _words(rng, 10 + size, 4)
    common = sorted(words[:10])
    often = max(5, min(30, tokens // 200))  # others occur three times
    listed = common * often + words[10:] * 3
    rng.shuffle(listed)
    document = "\n".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
    question = (
        "Which ten words occur most often in the list? Give them in alphabetical order, separated "
        "by commas."
    )
    return document, question, ", ".join(common)


def _fwe(rng: Random, size: int, _: int) -> tuple[str, str, str]:
    words = _words(rng, 500, 3)
    # The word of rank k stands 60 / k^2 times for each 100 words, and the first three surely more.
    total = 20 + size
    counts = [max(int(0.6 * total / rank**2), 5 - rank, 1) for rank in range(1, 1 + len(words))]
    counts[1], counts[0] = max(counts[1], counts[2] + 1), max(counts[0], counts[1] + 2)
    listed: list[str] = []
    for word, number in zip(words, counts, strict=True):
        if len(listed) < total or number > 1:
            listed += [word] * number
    rng.shuffle(listed)
    question = (
        "Which three made-up words occur most often in the text? Give them from the most frequent "
        "to the least frequent, separated by commas."
    )
    return " ".join(listed), question, ", ".join(words[:3])


def _qa(rng: Random, size: int, _: int) -> tuple[str, str, str]:
    people = [word.capitalize() for word in _words(rng, 1 + size, 4)]
    owned = [f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}" for _ in people]
    reports = [
        f"{name} works as a {rng.choice(_TRADES)}, lives near the {rng.choice(_ADJECTIVES)} "
        f"{rng.choice(_NOUNS)} and owns one thing of value, the {thing}."
        for name, thing in zip(people, owned, strict=True)
    ]
    asked = rng.randrange(len(people))
    question = f"What does {people[asked]} own?"
    return "\n\n".join(reports), question, owned[asked]


_TASKS: dict[RulerTask, Callable[[Random, int, int], tuple[str, str, str]]] = {
    "niah": _niah,
    "vt": _vt,
    "cwe": _cwe,
    "fwe": _fwe,
    "qa": _qa,
}
"""Each returns document, question and gold, given a size that the document grows with."""


def _words(rng: Random, num: int, syllables: int) -> list[str]:
    """Returns different made-up words in random order."""
    words: dict[str, None] = {}
    while len(words) < num:
        words["".join(rng.choices(_SYLLABLES, k=syllables))] = None
    return list(words)


def _scattered(rng: Random, size: int, needles: list[str]) -> str:
    """Returns `size` filler sentences with the needles among them, in their order."""
    places = sorted(rng.choices(range(size + 1), k=len(needles)))
    sentences = [
        rng.choice(_FILLER).format(rng.choice(_ADJECTIVES), rng.choice(_NOUNS)) for _ in range(size)
    ]
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        sentences.insert(place, needle)
    return "\n".join(sentences)
