"""Writes questions about Debian packages, as documents and JSONL files for `qlrl data docs`.

    python examples/smollm2-135m/data.py PACKAGES OUT

PACKAGES is a Packages file of a Debian archive, or what `apt-cache dumpavail` prints; it may end in
.gz or .xz. A document is one package's stanza. A question asks for one field of one of the packages
that it is shown with: 2-4 of them (short), 6-12 (long) or 24-46 (longer).

No package of a held-out file, nor one built from the same source, occurs in a training file. The
same PACKAGES and arguments write the same files.
"""

import argparse
import gzip
import json
import lzma
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

QUESTIONS = {
    "Version": "What is the version of the package {name}?",
    "Section": "What is the section of the package {name}?",
    "Installed-Size": "What is the installed size of the package {name}?",
    "Maintainer": "Who is the maintainer of the package {name}?",
    "Homepage": "What is the homepage of the package {name}?",
}
SHOWN = ("Package", *QUESTIONS, "Description")
SIZES = {"short": (2, 4), "long": (6, 12), "longer": (24, 46)}
HELD_OUT_PERCENT = 10

Stanza = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft", type=int, default=400, help="rows for the warm-up SFT")
    parser.add_argument("--train", type=int, default=1000, help="training questions of each size")
    parser.add_argument("--eval", type=int, default=256, help="held-out questions of each size")
    args = parser.parse_args()

    train, held_out = split(read_stanzas(args.packages))
    needed = max(args.sft, args.train, args.eval)
    if min(len(train), len(held_out)) < needed:
        raise SystemExit(
            f"data.py: {args.packages} has {len(train)} + {len(held_out)} packages with the fields "
            f"{', '.join(SHOWN)}; {needed} are needed for training and as many held out"
        )
    files = {"sft": draw(train, "short", args.sft, seed=f"{args.seed} sft", responses=True)}
    for size in SIZES:
        for part, stanzas, count in (("train", train, args.train), ("eval", held_out, args.eval)):
            name = f"{part}_{size}"
            files[name] = draw(stanzas, size, count, seed=f"{args.seed} {name}")
    write(args.out, files, {document_name(stanza): stanza for stanza in [*train, *held_out]})
    print(f"{args.out}: {len(train)} packages for training, {len(held_out)} held out")


def read_stanzas(path: Path) -> list[Stanza]:
    """Returns the shown fields and the source of every package that has them all, the first stanza
    of each name."""
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "rt", encoding="utf-8") as file:
        text = file.read()
    stanzas: dict[str, Stanza] = {}
    for block in text.split("\n\n"):
        lines = (line.partition(": ") for line in block.split("\n") if line[:1].strip())
        fields = {key: value.strip() for key, _, value in lines}
        if all(fields.get(key) for key in SHOWN):
            stanza = {key: fields[key] for key in SHOWN}
            # Only the name: an address is no one's business here, and costs tokens.
            stanza["Maintainer"] = stanza["Maintainer"].partition(" <")[0].strip('"')
            # "Source: acl (2.3.1-3)" where the versions differ.
            stanza["Source"] = fields.get("Source", fields["Package"]).split()[0]
            stanzas.setdefault(stanza["Package"], stanza)
    return list(stanzas.values())


def split(stanzas: Sequence[Stanza]) -> tuple[list[Stanza], list[Stanza]]:
    """Returns the packages for training and the held-out ones. Packages of one source share their
    version, maintainer and homepage, so they stay together."""
    parts: tuple[list[Stanza], list[Stanza]] = ([], [])
    for stanza in stanzas:
        parts[zlib.crc32(stanza["Source"].encode()) % 100 < HELD_OUT_PERCENT].append(stanza)
    return parts


def draw(
    stanzas: Sequence[Stanza], size: str, count: int, *, seed: str, responses: bool = False
) -> list[dict[str, Any]]:
    """Returns `count` questions on different packages, each shown among others in random order."""
    rng = random.Random(seed)
    records = []
    for index, stanza in enumerate(rng.sample(stanzas, count)):
        field = list(QUESTIONS)[index % len(QUESTIONS)]
        name, answer = stanza["Package"], stanza[field]
        number = rng.randint(*SIZES[size])
        others = [other for other in rng.sample(stanzas, number) if other is not stanza]
        shown = [stanza, *others[: number - 1]]
        rng.shuffle(shown)
        record = {
            "document": [document_name(other) for other in shown],
            "question": QUESTIONS[field].format(name=name),
            "answer": answer,
            "data_source": f"docs_musique_{field.lower()}",
        }
        if responses:
            record["response"] = (
                f'The text on {name} says "{field}: {answer}". Therefore, the answer is ({answer}).'
            )
        records.append(record)
    return records


def document_name(stanza: Stanza) -> str:
    return f"{stanza['Package']}.txt"


def write(out: Path, files: dict[str, list[dict[str, Any]]], stanzas: dict[str, Stanza]) -> None:
    """Writes <out>/<name>.jsonl for every file and the documents that they name."""
    documents = out / "documents"
    documents.mkdir(parents=True, exist_ok=True)
    for name in {name for records in files.values() for name in names(records)}:
        text = "\n".join(f"{key}: {stanzas[name][key]}" for key in SHOWN)
        (documents / name).write_text(text, encoding="utf-8")
    for name, records in files.items():
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def names(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    for record in records:
        yield from record["document"]


if __name__ == "__main__":
    main()
