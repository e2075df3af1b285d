"""`qlrl data`: builds data sets."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Build data sets.", no_args_is_help=True)

ToyKind = Literal["needle", "needles", "two_hop"]  # copied from data.builders.toy: no numpy here
RulerTask = Literal["niah", "vt", "cwe", "fwe", "qa"]
BenchmarkName = Literal[
    "docmath", "docmath_all", "frames", "2wikimqa", "hotpotqa", "musique", "narrativeqa", "qasper",
    "longbench_v2", "mrcr", "tatqa",
]  # fmt: skip


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
