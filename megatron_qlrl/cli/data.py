"""`qlrl data`: builds data sets, and says what files hold."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_qlrl.errors import DataError

app = typer.Typer(help="Build data sets; look into them.", no_args_is_help=True)

ToyKind = Literal["needle", "needles", "two_hop"]  # copied from data.builders.toy: no numpy here
RulerTask = Literal["niah", "vt", "cwe", "fwe", "qa"]
BenchmarkName = Literal[
    "docmath", "docmath_all", "frames", "2wikimqa", "hotpotqa", "musique", "narrativeqa", "qasper",
    "longbench_v2", "mrcr", "tatqa",
]  # fmt: skip

FamilyName = Literal["musique", "multihoprag", "docmath", "choice"]


@app.command("toy")
def data_toy(
    out: Annotated[Path, typer.Argument(help="Folder for the parquet files.")],
    seed: Annotated[int, typer.Option(help="Seed of every sampled fact.")] = 0,
    train: Annotated[int, typer.Option(min=1, help="Training prompts per file.")] = 2000,
    evaluation: Annotated[int, typer.Option("--eval", min=1, help="Held-out prompts.")] = 256,
    kind: Annotated[ToyKind, typer.Option(help="What is asked for.")] = "needle",
) -> None:
    """Build the toy document-QA task of the quickstart."""
    from megatron_qlrl.data.builders.toy import build_toy

    files = build_toy(out, seed=seed, num_train=train, num_eval=evaluation, kind=kind)
    for name, path in files.items():
        typer.echo(f"{name}: {path}")


@app.command("docs")
def data_docs(
    documents: Annotated[Path, typer.Argument(help="Folder of text documents.")],
    questions: Annotated[Path, typer.Argument(help="JSONL file of questions and answers.")],
    out: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    split: Annotated[str, typer.Option(help="Recorded in each row.")] = "train",
) -> None:
    """Build a data set from your own documents and questions."""
    from megatron_qlrl.data.builders.docs import build_docs
    from megatron_qlrl.reward.rules import check_gold

    rows = build_docs(
        documents_dir=documents, questions=questions, out=out, split=split, check_gold=check_gold
    )
    typer.echo(f"{rows} rows: {out}")


@app.command("benchmark")
def data_benchmark(
    name: Annotated[BenchmarkName, typer.Argument(help="The set.")],
    source: Annotated[Path, typer.Argument(help="Its official file, or the folder of it.")],
    out: Annotated[Path, typer.Argument(help="Parquet file to write.")],
) -> None:
    """Build a held-out set of the literature from its official files."""
    from megatron_qlrl.data.builders.benchmarks import BENCHMARKS, build_benchmark
    from megatron_qlrl.reward.rules import check_gold

    rows = build_benchmark(name, source, out, check_gold=check_gold)
    size, licence = BENCHMARKS[name].size, BENCHMARKS[name].licence
    note = "" if rows == size else f" (the published set has {size})"
    typer.echo(f"{rows} rows{note}: {out}; licence: {licence}")


@app.command("family")
def data_family(
    name: Annotated[FamilyName, typer.Argument(help="The family.")],
    source: Annotated[Path, typer.Argument(help="Its raw file, or the folder of it.")],
    out: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    distractors: Annotated[
        int,
        typer.Option(
            min=0, help="Texts of other questions in each document (musique, multihoprag)."
        ),
    ] = 10,
    seed: Annotated[int, typer.Option(help="Of the distractors and the order of texts.")] = 0,
    split: Annotated[str, typer.Option(help="Recorded in each row.")] = "train",
) -> None:
    """Build training data of a family of DocQA-RL-1.6K from its raw parts."""
    from megatron_qlrl.data.builders.families import build_family
    from megatron_qlrl.reward.rules import check_gold

    rows = build_family(
        name, source, out, distractors=distractors, seed=seed, split=split, check_gold=check_gold
    )
    typer.echo(f"{rows} rows: {out}")


@app.command("ruler")
def data_ruler(
    out: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    task: Annotated[RulerTask, typer.Option(help="What is asked for.")],
    tokens: Annotated[
        int, typer.Option(min=512, max=131_072, help="Length of a prompt, chat template included.")
    ],
    model: Annotated[Path, typer.Option(help="Model folder, whose tokenizer counts.")],
    num: Annotated[int, typer.Option(min=1, help="Questions.")] = 100,
    seed: Annotated[int, typer.Option(help="Of every sampled word.")] = 0,
) -> None:
    """Build synthetic retrieval tasks of a given length, after RULER's families."""
    from megatron_qlrl.data.builders.ruler import build_ruler
    from megatron_qlrl.data.template import render
    from megatron_qlrl.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    longest = build_ruler(
        out,
        task=task,
        tokens=tokens,
        num=num,
        seed=seed,
        count=lambda text: len(render(tokenizer, [{"role": "user", "content": text}], None)),
    )
    typer.echo(f"{num} rows of at most {longest} tokens: {out}")


@app.command("stats")
def data_stats(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Parquet, verl's format.")],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Model folder: lengths in its tokens, chat template included, not words."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Count rows and lengths by source, and rows that are there twice."""
    from megatron_qlrl.data.dataset import TextRow, iter_texts
    from megatron_qlrl.data.stats import data_stats, stats_lines

    if model is None:
        stats = data_stats(iter_texts(files))
    else:
        from megatron_qlrl.data.template import render
        from megatron_qlrl.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(model)

        def prompt_length(row: TextRow) -> int:
            return len(render(tokenizer, row.messages, None))

        stats = data_stats(
            iter_texts(files),
            unit="tokens",
            prompt_length=prompt_length,
            text_length=lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
        )
    typer.echo(json.dumps(asdict(stats), indent=1) if as_json else "\n".join(stats_lines(stats)))


@app.command("overlap")
def data_overlap(
    train: Annotated[Path, typer.Argument(help="Training file (parquet), or a folder of some.")],
    held_out: Annotated[Path, typer.Argument(metavar="EVAL", help="Held-out file, or a folder.")],
    document_ngram: Annotated[int, typer.Option(min=1, help="Words of a document's n-gram.")] = 13,
    question_ngram: Annotated[int, typer.Option(min=1, help="Words of a question's n-gram.")] = 8,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="List rows that share this part of their n-grams.")
    ] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Name held-out rows whose document or question is in training, exactly or in part."""
    from megatron_qlrl.data.dataset import iter_texts
    from megatron_qlrl.data.overlap import data_overlap, overlap_lines

    files = {path: _parquet_files(path) for path in (train, held_out)}
    overlaps = data_overlap(
        lambda: iter_texts(files[train]),
        lambda: iter_texts(files[held_out]),
        ngrams={"document": document_ngram, "question": question_ngram},
        threshold=threshold,
    )
    if as_json:
        shown = {kind: asdict(overlap) for kind, overlap in overlaps.items()}
        typer.echo(json.dumps(shown, indent=1))
    else:
        typer.echo("\n".join(overlap_lines(overlaps, threshold=threshold)))


def _parquet_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise DataError(f"folder {path} holds no parquet file")
    return files
