"""Writes questions about Debian packages, as documents and JSONL files for `qlrl data docs`.

    python examples/smollm2-135m/data.py PACKAGES OUT

PACKAGES is a Packages file of a Debian archive, or what `apt-cache dumpavail` prints; it may end in
.gz or .xz. A document is one package's stanza. A question asks for one field of one of the packages
that it is shown with: 2-4 of them (short), 6-12 (long) or 24-46 (longer).

With --tatqa FILE (tatqa_dataset_train.json of github.com/NExTplusplus/TAT-QA, CC BY 4.0) there are
numeric questions, too: on a page of a financial report, shown alone or with one or two others.

No package of a held-out file, nor one built from the same source, and no report of one occurs in a
training file. The same input and arguments write the same files.
"""

import argparse
import gzip
import json
import lzma
import random
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_qlrl.reward.numeric import parse_number

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
NUMERIC_ROUNDS = 4  # how often training shows a numeric question, with other reports each time

Stanza = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft", type=int, default=400, help="rows for the warm-up SFT")
    parser.add_argument("--train", type=int, default=1000, help="training questions of each size")
    parser.add_argument(
        "--eval", type=int, default=256, help="held-out questions of each size (longer: a quarter)"
    )
    parser.add_argument("--tatqa", type=Path, help="file of TAT-QA, for numeric questions")
    args = parser.parse_args()

    train, held_out = split(read_stanzas(args.packages))
    needed = max(args.sft, args.train, args.eval)
    if min(len(train), len(held_out)) < needed:
        raise SystemExit(
            f"data.py: {args.packages} has {len(train)} + {len(held_out)} packages with the fields "
            f"{', '.join(SHOWN)}; {needed} are needed for training and as many held out"
        )
    texts = {document_name(stanza["Package"]): text_of(stanza) for stanza in [*train, *held_out]}
    files = {"sft": draw(train, "short", args.sft, seed=f"{args.seed} sft", responses=True)}
    for size in SIZES:
        # A document of 3,000 tokens takes as long as nine short ones.
        asked = args.eval // 4 if size == "longer" else args.eval
        for part, stanzas, count in (("train", train, args.train), ("eval", held_out, asked)):
            name = f"{part}_{size}"
            files[name] = draw(stanzas, size, count, seed=f"{args.seed} {name}")
    if args.tatqa:
        parts = split_reports(read_reports(args.tatqa), args.eval)
        for part, reports in zip(("train", "eval"), parts, strict=True):
            name = f"{part}_numeric"
            rounds = NUMERIC_ROUNDS if part == "train" else 1
            records = draw_numeric(reports, rounds=rounds, seed=f"{args.seed} {name}")
            # A small model answers few of them, so they are a part of the training only.
            files[name] = records[: args.train // 4 if part == "train" else args.eval]
            texts |= {document_name(report["Source"]): report["text"] for report in reports}
    write(args.out, files, texts)
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
    """Returns what is for training and what is held out. Packages of one source stay together, as
    they share their version, maintainer and homepage."""
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
            "document": [document_name(other["Package"]) for other in shown],
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


def read_reports(path: Path) -> list[Stanza]:
    """Returns each report's text under a title, and its questions whose answer is one number."""
    reports = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        source = record["table"]["uid"][:8]
        table = "\n".join(" | ".join(row) for row in record["table"]["table"])
        paragraphs = (p["text"] for p in sorted(record["paragraphs"], key=lambda p: p["order"]))
        text = "\n".join((f"Report {source}", *paragraphs, table))
        questions = [q for q in map(numeric_question, record["questions"]) if q]
        reports.append({"Source": source, "text": text, "questions": questions})
    return reports


def split_reports(reports: Sequence[Stanza], count: int) -> tuple[list[Stanza], list[Stanza]]:
    """Returns the reports for training, and enough held-out ones for `count` questions; of a small
    file, five sixths at most."""
    reports = sorted(reports, key=lambda report: zlib.crc32(report["Source"].encode()))
    totals = accumulate(len(report["questions"]) for report in reports)
    held_out = 1 + sum(total < count for total in totals)
    held_out = min(held_out, len(reports) * 5 // 6)
    return reports[held_out:], reports[:held_out]


def numeric_question(question: dict[str, Any]) -> dict[str, str] | None:
    """Returns the text, gold and kind of a question of TAT-QA, or None if no number answers it."""
    answer, kind, scale = question["answer"], question["answer_type"], question["scale"]
    gold = str(answer[0] if isinstance(answer, list) and len(answer) == 1 else answer)
    if kind not in ("span", "arithmetic", "count") or parse_number(gold) is None:
        return None
    text = question["question"]
    if scale == "percent":
        gold, text = f"{gold.rstrip('% ')}%", f"{text} Answer in percent."
    elif scale:
        text += f" Answer in {scale}s."
    return {"question": text, "answer": gold, "kind": kind}


def draw_numeric(reports: Sequence[Stanza], *, rounds: int, seed: str) -> list[dict[str, Any]]:
    """Returns every numeric question `rounds` times in random order, its report among up to two
    others."""
    rng = random.Random(seed)
    records = []
    for report in reports:
        for asked in rounds * report["questions"]:
            others = [other for other in rng.sample(reports, 3) if other is not report]
            shown = [report, *others[: rng.randint(0, 2)]]
            rng.shuffle(shown)
            records.append(
                {
                    "document": [document_name(other["Source"]) for other in shown],
                    "question": f"This is about report {report['Source']}. {asked['question']}",
                    "answer": asked["answer"],
                    "kind": "math",
                    "data_source": f"docs_docmath_{asked['kind']}",
                }
            )
    rng.shuffle(records)
    return records


def document_name(title: str) -> str:
    return f"{title}.txt"


def text_of(stanza: Stanza) -> str:
    return "\n".join(f"{key}: {stanza[key]}" for key in SHOWN)


def write(out: Path, files: dict[str, list[dict[str, Any]]], texts: dict[str, str]) -> None:
    """Writes <out>/<name>.jsonl for every file and the documents that they name."""
    documents = out / "documents"
    documents.mkdir(parents=True, exist_ok=True)
    for name in {name for records in files.values() for name in names(records)}:
        (documents / name).write_text(texts[name], encoding="utf-8")
    for name, records in files.items():
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def names(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    for record in records:
        yield from record["document"]


if __name__ == "__main__":
    main()
