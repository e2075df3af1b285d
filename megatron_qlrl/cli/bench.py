"""`qlrl bench`: figures as JSON on stdout, both sides of each comparison in one process."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_qlrl.cli.ranks import on_ranks
from megatron_qlrl.platform.env import read_ranks

Count = Annotated[int, typer.Option(min=1)]
Vocabulary = Annotated[int, typer.Option(min=2)]
Rounds = Annotated[int, typer.Option(min=1, help="Medians are over so many.")]

app = typer.Typer(help="Measure; JSON on stdout.", no_args_is_help=True)


@app.command()
def update(
    prompt_tokens: Count = 2048,
    response_tokens: Count = 64,
    group: Annotated[int, typer.Option(min=1, help="Responses to the prompt.")] = 8,
    layers: Count = 4,
    hidden: Count = 512,
    heads: Count = 8,
    kv_heads: Count = 2,
    ffn: Count = 1536,
    vocab: Vocabulary = 32_768,
    rounds: Rounds = 3,
) -> None:
    """One update with the prompt computed once, against once for each response."""
    from megatron_qlrl.bench.policy import make_shape
    from megatron_qlrl.bench.update import bench_update

    shape = make_shape(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab,
        positions=prompt_tokens + response_tokens,
    )  # fmt: skip
    _print(
        bench_update(
            shape,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            group=group,
            rounds=rounds,
        )
    )


@app.command()
def logprob(
    vocab: Vocabulary = 151_936,
    tokens: Annotated[int, typer.Option(min=4)] = 4096,
    hidden: Count = 128,
    rounds: Rounds = 3,
) -> None:
    """Log-probs and entropy in blocks, against full logits."""
    from megatron_qlrl.bench.logprob import bench_logprob

    _print(bench_logprob(vocab=vocab, hidden=hidden, tokens=tokens, rounds=rounds))


@app.command()
def pack(
    prompts: Annotated[int, typer.Option(min=1, help="Groups in a batch.")] = 512,
    ranks: Annotated[int, typer.Option(min=1, help="Data parallel ranks.")] = 64,
    group: Annotated[int, typer.Option(min=1, help="Responses to a prompt.")] = 8,
    mixes: Annotated[int, typer.Option(min=0, help="Random batches to try the cap on.")] = 10_000,
) -> None:
    """Balance over ranks and the token cap on DocQA lengths, for a 14B model's FLOPs."""
    from megatron_qlrl.bench.pack import bench_pack
    from megatron_qlrl.bench.policy import make_shape

    shape = make_shape(
        layers=48, hidden=5120, heads=40, kv_heads=8, ffn=13_824, vocab=152_064,
        positions=131_072,
    )  # fmt: skip
    _print(bench_pack(shape, prompts=prompts, ranks=ranks, group=group, mixes=mixes))


@app.command()
def row(
    prompt_tokens: Count = 60_000,
    response_tokens: Count = 1000,
    group: Annotated[int, typer.Option(min=1, help="Responses to the prompt.")] = 8,
    layers: Count = 2,
    hidden: Count = 128,
    heads: Count = 4,
    kv_heads: Count = 2,
    ffn: Count = 256,
    vocab: Vocabulary = 32_768,
    cp: Annotated[int, typer.Option(min=1, help="Context parallel size: so many ranks.")] = 1,
) -> None:
    """One update on one long shared row, by default of a narrow model: time and peak memory."""

    def run() -> None:
        from megatron_qlrl.bench.policy import make_shape
        from megatron_qlrl.bench.row import bench_row

        shape = make_shape(
            layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab,
            positions=prompt_tokens + response_tokens,
        )  # fmt: skip
        found = bench_row(
            shape,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            group=group,
            cp=cp,
        )
        if read_ranks().rank == 0:
            _print(found)

    on_ranks(sys.argv[1:], cp, check=lambda world_size: None, run=run)


@app.command()
def reward(
    samples: Count = 1024,
    latency_ms: Annotated[float, typer.Option(min=0, help="Of the judge.")] = 50.0,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 64,
    rounds: Rounds = 3,
) -> None:
    """The judge's verdicts a second over HTTP, and answers a second by the rules alone."""
    from megatron_qlrl.bench.reward import bench_reward

    _print(
        bench_reward(
            samples=samples, latency_s=latency_ms / 1000, in_flight=in_flight, rounds=rounds
        )
    )


@app.command()
def checkpoint(
    folder: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="On the disk in question.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the updates beside it.")] = 512,
    layers: Count = 4,
    hidden: Count = 512,
    heads: Count = 8,
    kv_heads: Count = 2,
    ffn: Count = 1536,
    vocab: Vocabulary = 32_768,
    rounds: Rounds = 3,
) -> None:
    """What a checkpoint takes from training: written beside it, against waited for."""
    from megatron_qlrl.bench.checkpoint import bench_checkpoint
    from megatron_qlrl.bench.policy import make_shape

    shape = make_shape(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab,
        positions=prompt_tokens + 128,
    )  # fmt: skip
    _print(bench_checkpoint(shape, prompt_tokens=prompt_tokens, rounds=rounds, folder=folder))


def _print(found: dict[str, Any]) -> None:
    typer.echo(json.dumps(found, indent=1))
