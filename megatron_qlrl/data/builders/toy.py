"""Builds a toy retrieval task that a model of 0.2M parameters can learn on two CPU cores.

A document is a list of one-line sentences. Each names one item ("bronze", "eel") of a category
("metal", "fish"), except for a few that name none. There are three kinds of question:

* `needle`: "Which fish does the text mention?" - the document names exactly one.
* `needles`: "Which fish and which metal does the text mention?" - two such look-ups in one answer.
* `two_hop`: "Which fish is mentioned in the town where the baker lives?" - the document names
  several fish in different towns, and says in other sentences who lives where.

No document occurs twice, in one file or in two. All files are in verl's format, with `document` and
`question` as further columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_qlrl.data.dataset import verl_schema
from megatron_qlrl.data.template import docqa_message
from megatron_qlrl.platform.files import make_folder, replaced

ToyKind = Literal["needle", "needles", "two_hop"]
ToyLength = Literal["short", "long", "longer"]

NUM_FACTS: dict[ToyLength, tuple[int, int]] = {
    "short": (6, 10),
    "long": (24, 40),
    "longer": (96, 140),
}
"""Inclusive range of the number of facts in a document."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Every word occurs once in the whole table and becomes one token of the toy tokenizer.
ITEMS: dict[str, tuple[str, ...]] = {
    "animal": _words("otter badger lynx camel moose zebra ferret bison hyena gibbon"),
    "fruit": _words("apple mango cherry papaya quince apricot banana lemon melon peach"),
    "tool": _words("hammer chisel wrench pliers shovel mallet sickle drill rasp trowel"),
    "metal": _words("bronze copper nickel cobalt silver zinc titanium iron pewter lead"),
    "flower": _words("peony tulip dahlia orchid violet jasmine lupin crocus aster daisy"),
    "tree": _words("birch cedar maple willow poplar spruce linden larch alder cypress"),
    "instrument": _words("violin cello oboe bassoon trumpet banjo lute zither guitar harp"),
    "spice": _words("saffron cumin ginger paprika nutmeg clove pepper sumac anise fennel"),
    "fabric": _words("velvet linen denim satin tweed muslin cotton felt corduroy chiffon"),
    "vehicle": _words("tram wagon ferry canoe tractor sledge bicycle truck glider barge"),
    "drink": _words("cider coffee cocoa brandy whisky lemonade tea vodka mead sherry"),
    "stone": _words("granite marble basalt slate quartz topaz jade onyx flint amber"),
    "fish": _words("trout salmon herring eel carp halibut turbot perch sturgeon tuna"),
    "dance": _words("waltz tango polka rumba samba minuet foxtrot mazurka salsa bolero"),
    "weapon": _words("sword dagger musket halberd crossbow lance sabre cannon spear rifle"),
    "bread": _words("baguette bagel brioche ciabatta rye pretzel focaccia naan bun crumpet"),
}
ROLES = _words(
    "mayor baker doctor teacher painter judge farmer sailor tailor poet "
    "miller smith banker nurse priest hunter"
)
TOWNS = _words(
    "Ostrava Lisbon Turin Ghent Leeds Bergen Krakow Porto Basel Nantes Seville Malmo "
    "Tartu Zagreb Varna Izmir Quito Lima Osaka Hanoi Dakar Tunis Perth Boston"
)
_MENTIONS = (
    "The {role} of {town} wrote about the {item}.",
    "In {town} the {role} talked about the {item}.",
    "The {item} was of interest to the {role} of {town}.",
    "A report from {town} mentions the {item}.",
    "Last year the {item} was discussed in {town}.",
)
# No role here: in `two_hop` a role says where someone lives and nothing else.
_MENTIONS_IN_TOWN = _MENTIONS[3:]
_HOME = "The {role} lives in {town}."
_FILLERS = (
    "The river in {town} was calm in spring.",
    "Many visitors came to {town} that summer.",
    "It rained for a week in {town}.",
    "The bridge of {town} was closed for repairs.",
    "Nothing else happened in {town}.",
    "The old library in {town} opened again.",
)
_FILLER_SHARE = 0.3


@dataclass(frozen=True)
class ToyRecord:
    """One question about one document, with the response that SFT imitates.

    `response` continues after the chat template's opening `<think>` and has no end token.
    """

    document: str
    question: str
    answer: str
    response: str

    @property
    def message(self) -> str:
        """Returns the user message, in the same form as for real data."""
        return docqa_message(document=self.document, question=self.question, kind="qa")


def make_record(rng: np.random.Generator, kind: ToyKind, num_facts: int) -> ToyRecord:
    """Draws one record whose document holds `num_facts` facts (at least 2; `two_hop`: 4)."""
    return _MAKERS[kind](rng, num_facts)


def toy_corpus(seed: int, num_texts: int) -> list[str]:
    """Returns messages and responses of short documents of all kinds, to train a tokenizer on."""
    rng = np.random.default_rng(seed)
    kinds: tuple[ToyKind, ...] = ("needle", "needles", "two_hop")
    records = [_draw(rng, kinds[i % len(kinds)], "short") for i in range(num_texts)]
    return [f"{record.message}\n<think>\n{record.response}" for record in records]


def build_toy(
    out_dir: Path,
    *,
    seed: int,
    num_train: int,
    num_eval: int,
    kind: ToyKind = "needle",
    lengths: Sequence[ToyLength] = ("short", "long"),
) -> dict[str, Path]:
    """Writes the toy data set and returns its files by name.

    * `sft` (num_train rows): short documents with a `response` column.
    * `train` (num_train rows): documents of all `lengths` in turn, for phases by input length.
    * `eval_short`, `eval_long`, ... (num_eval rows each): held-out documents of each length.

    The same arguments write the same rows.

    Raises:
        ConfigError: the folder or a file cannot be written.
    """
    plan: dict[str, tuple[int, Sequence[ToyLength]]] = {
        "sft": (num_train, ("short",)),
        "train": (num_train, lengths),
        **{f"eval_{length}": (num_eval, (length,)) for length in lengths},
    }
    make_folder(out_dir)
    seen: set[str] = set()
    paths: dict[str, Path] = {}
    for part, (name, (num_rows, row_lengths)) in enumerate(plan.items()):
        rng = np.random.default_rng([seed, part])
        rows = []
        for index in range(num_rows):
            length = row_lengths[index % len(row_lengths)]
            record = first_unseen(partial(_draw, rng, kind, length), seen)
            rows.append(_row(record, kind=kind, length=length, split=name, index=index))
        extra_info = {"split": pa.string(), "index": pa.int64(), "length": pa.string()}
        schema = verl_schema(extra_info, has_response=name == "sft")
        paths[name] = out_dir / f"{name}.parquet"
        with replaced(paths[name]) as fresh:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), fresh)
    return paths


def _row(
    record: ToyRecord, *, kind: ToyKind, length: ToyLength, split: str, index: int
) -> dict[str, Any]:
    return {
        "data_source": f"toy_docqa_{kind}",
        "prompt": [{"role": "user", "content": record.message}],
        "ability": "retrieval",
        "reward_model": {"style": "rule", "ground_truth": record.answer},
        "extra_info": {"split": split, "index": index, "length": length},
        "document": record.document,
        "question": record.question,
        "response": record.response,
    }


def _draw(rng: np.random.Generator, kind: ToyKind, length: ToyLength) -> ToyRecord:
    low, high = NUM_FACTS[length]
    return make_record(rng, kind, int(rng.integers(low, high + 1)))


def first_unseen(draw: Callable[[], ToyRecord], seen: set[str]) -> ToyRecord:
    """Draws until the document is not in `seen`, adds it there, and returns the record."""
    while (record := draw()).document in seen:
        pass
    seen.add(record.document)
    return record


def _needle(rng: np.random.Generator, num_facts: int) -> ToyRecord:
    (category,) = _some(rng, tuple(ITEMS), 1)
    (item,) = _some(rng, ITEMS[category], 1)
    items = [item, *_other_items(rng, (category,), num_facts - 1)]
    return ToyRecord(
        document=_document(rng, [_fill(rng, _MENTIONS, item=x) for x in items]),
        question=f"Which {category} does the text mention?",
        answer=item,
        response=f"The {category} in the text is the {item}.\n{_closing(item)}",
    )


def _needles(rng: np.random.Generator, num_facts: int) -> ToyRecord:
    first, second = _some(rng, tuple(ITEMS), 2)
    x, y = _some(rng, ITEMS[first], 1)[0], _some(rng, ITEMS[second], 1)[0]
    items = [x, y, *_other_items(rng, (first, second), num_facts - 2)]
    return ToyRecord(
        document=_document(rng, [_fill(rng, _MENTIONS, item=item) for item in items]),
        question=f"Which {first} and which {second} does the text mention?",
        answer=f"{x} and {y}",
        response=(
            f"The {first} in the text is the {x}. The {second} in the text is the {y}.\n"
            f"{_closing(f'{x} and {y}')}"
        ),
    )


def _two_hop(rng: np.random.Generator, num_facts: int) -> ToyRecord:
    assert num_facts >= 4
    (category,) = _some(rng, tuple(ITEMS), 1)
    # There are several candidates, so that the category alone does not give the answer.
    num_candidates = max(2, num_facts // 4)
    candidates = _some(rng, ITEMS[category], num_candidates)
    towns = _some(rng, TOWNS, num_candidates)
    roles = _some(rng, ROLES, num_candidates)
    item, town, role = candidates[0], towns[0], roles[0]
    sentences = [
        *(
            _fill(rng, _MENTIONS_IN_TOWN, item=x, town=t)
            for x, t in zip(candidates, towns, strict=True)
        ),
        *(_fill(rng, (_HOME,), role=r, town=t) for r, t in zip(roles, towns, strict=True)),
        *(
            _fill(rng, _MENTIONS_IN_TOWN, item=x)
            for x in _other_items(rng, (category,), num_facts - 2 * num_candidates)
        ),
    ]
    return ToyRecord(
        document=_document(rng, sentences),
        question=f"Which {category} is mentioned in the town where the {role} lives?",
        answer=item,
        response=(
            f"The {role} lives in {town}. The {category} in {town} is the {item}.\n{_closing(item)}"
        ),
    )


_MAKERS: dict[ToyKind, Callable[[np.random.Generator, int], ToyRecord]] = {
    "needle": _needle,
    "needles": _needles,
    "two_hop": _two_hop,
}


def _closing(answer: str) -> str:
    return f"</think>\n\nTherefore, the answer is {answer}."


def _other_items(rng: np.random.Generator, asked: Sequence[str], count: int) -> list[str]:
    """Items of the categories that are not asked for, spread evenly over them."""
    others = tuple(category for category in ITEMS if category not in asked)
    categories: list[str] = []
    while len(categories) < count:
        categories += _some(rng, others, min(len(others), count - len(categories)))
    return [_some(rng, ITEMS[category], 1)[0] for category in categories]


def _document(rng: np.random.Generator, sentences: Sequence[str]) -> str:
    fillers = [_fill(rng, _FILLERS) for _ in range(int(_FILLER_SHARE * len(sentences)))]
    lines = [*sentences, *fillers]
    return "\n".join(lines[i] for i in rng.permutation(len(lines)))


def _fill(rng: np.random.Generator, templates: tuple[str, ...], **fields: str) -> str:
    values = {"role": _some(rng, ROLES, 1)[0], "town": _some(rng, TOWNS, 1)[0], **fields}
    return _some(rng, templates, 1)[0].format(**values)


def _some(rng: np.random.Generator, pool: tuple[str, ...], count: int) -> list[str]:
    """Returns `count` different elements in random order."""
    return [pool[i] for i in rng.permutation(len(pool))[:count]]
