"""`qlrl bench`: prints measurements as JSON; both sides of a comparison run in one process."""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_qlrl.cli.ranks import on_ranks, shown_once
from megatron_qlrl.config.load import load_config
from megatron_qlrl.platform.env import read_ranks

Count = Annotated[int, typer.Option(min=1)]
Vocabulary = Annotated[int, typer.Option(min=2)]
Group = Annotated[int, typer.Option(min=1, help="Responses to a prompt.")]
Rounds = Annotated[int, typer.Option(min=1, help="Repetitions; the figures are medians.")]

app = typer.Typer(help="Measure; JSON on stdout.", no_args_is_help=True)


def _sized(**defaults: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one option for each size of the model; it receives them as `**sizes`."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        *own, _ = signature.parameters.values()
        options = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=size,
                annotation=Vocabulary if name == "vocab" else Count,
            )
            for name, size in defaults.items()
        ]
        command.__signature__ = signature.replace(parameters=own + options)  # pyright: ignore[reportFunctionMemberAccess]
        return command

    return wrap


@app.command()
@_sized(layers=4, hidden=512, heads=8, kv_heads=2, ffn=1536, vocab=32_768)
def update(
    prompt_tokens: Count = 2048,
    response_tokens: Count = 64,
    group: Group = 8,
    rounds: Rounds = 3,
    **sizes: int,
) -> None:
    """Measure an update with the prompt computed once, against once for each response."""
    from megatron_qlrl.bench.policy import make_shape
    from megatron_qlrl.bench.update import bench_update

    shape = make_shape(**sizes, positions=prompt_tokens + response_tokens)
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
    """Measure log-probs and entropies computed in blocks, against full logits."""
    from megatron_qlrl.bench.logprob import bench_logprob

    _print(bench_logprob(vocab=vocab, hidden=hidden, tokens=tokens, rounds=rounds))


@app.command()
def pack(
    prompts: Annotated[int, typer.Option(min=1, help="Groups in a batch.")] = 512,
    ranks: Annotated[int, typer.Option(min=1, help="Data parallel ranks.")] = 64,
    group: Group = 8,
    mixes: Annotated[int, typer.Option(min=0, help="Random batches to try the cap on.")] = 10_000,
) -> None:
    """Measure the balance over ranks at DocQA's lengths and a 14B model's FLOPs."""
    from megatron_qlrl.bench.pack import bench_pack
    from megatron_qlrl.bench.policy import make_shape

    shape = make_shape(
        layers=48, hidden=5120, heads=40, kv_heads=8, ffn=13_824, vocab=152_064,
        positions=131_072,
    )  # fmt: skip
    _print(bench_pack(shape, prompts=prompts, ranks=ranks, group=group, mixes=mixes))


@app.command()
@_sized(layers=2, hidden=128, heads=4, kv_heads=2, ffn=256, vocab=32_768)
def row(
    prompt_tokens: Count = 60_000,
    response_tokens: Count = 1000,
    group: Group = 8,
    cp: Annotated[int, typer.Option(min=1, help="Context parallel size, one rank each.")] = 1,
    **sizes: int,
) -> None:
    """Measure time and peak memory of an update on one long shared row of a narrow model."""

    def run() -> None:
        from megatron_qlrl.bench.policy import make_shape
        from megatron_qlrl.bench.row import bench_row

        shape = make_shape(**sizes, positions=prompt_tokens + response_tokens)
        figures = bench_row(
            shape,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            group=group,
            cp=cp,
        )
        if read_ranks().rank == 0:
            _print(figures)

    on_ranks(sys.argv[1:], cp, check=lambda world_size: None, run=run)


@app.command()
@_sized(layers=8, hidden=512, heads=8, kv_heads=2, ffn=1536, vocab=32_768)
def sync(
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel size of the trainer.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Its pipeline parallel size.")] = 1,
    engine_tp: Annotated[int, typer.Option(min=1, help="Ranks of an engine.")] = 1,
    bucket_mib: Annotated[int, typer.Option(min=1, help="rollout.sync_bucket_mib.")] = 64,
    rounds: Rounds = 3,
    **sizes: int,
) -> None:
    """Measure the stream of weights into engines, on tp x pp ranks, against a gather of each
    tensor and a copy in memory."""
    if tp * pp % engine_tp:
        raise typer.BadParameter(f"{tp * pp} ranks do not form engines of {engine_tp} ranks each")

    def run() -> None:
        from megatron_qlrl.bench.policy import make_shape
        from megatron_qlrl.bench.sync import bench_sync

        shape = make_shape(**sizes, positions=128)
        figures = bench_sync(
            shape, tp=tp, pp=pp, engine_tp=engine_tp, bucket_mib=bucket_mib, rounds=rounds
        )
        if read_ranks().rank == 0:
            _print(figures)

    on_ranks(sys.argv[1:], tp * pp, check=lambda world_size: None, run=run)


@app.command()
def reward(
    samples: Count = 1024,
    latency_ms: Annotated[float, typer.Option(min=0, help="The judge's latency.")] = 50.0,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 64,
    rounds: Rounds = 3,
) -> None:
    """Measure verdicts per second from a judge over HTTP, and answers per second by the rules."""
    from megatron_qlrl.bench.reward import bench_reward

    _print(
        bench_reward(
            samples=samples, latency_s=latency_ms / 1000, in_flight=in_flight, rounds=rounds
        )
    )


@app.command()
@_sized(layers=4, hidden=512, heads=8, kv_heads=2, ffn=1536, vocab=32_768)
def checkpoint(
    folder: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder on the disk to measure."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt length of the updates.")] = 512,
    rounds: Rounds = 3,
    **sizes: int,
) -> None:
    """Measure the time lost to a checkpoint that is written during training, or waited for."""
    from megatron_qlrl.bench.checkpoint import bench_checkpoint
    from megatron_qlrl.bench.policy import make_shape

    shape = make_shape(**sizes, positions=prompt_tokens + 128)
    _print(bench_checkpoint(shape, prompt_tokens=prompt_tokens, rounds=rounds, folder=folder))


@app.command()
def step(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Config of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings: a.b=value.")] = None,
    prompt_tokens: Count = 512,
    response_tokens: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Rounds = 3,
) -> None:
    """Measure the parts of an RL step on a real model, in one process: weights into the engine,
    prefill, decode and update, beside this machine's copy and matmul."""
    with shown_once():
        loaded = load_config(config, overrides or [])
    from megatron_qlrl.bench.step import bench_step

    _print(
        bench_step(
            loaded,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            rounds=rounds,
        )
    )


@app.command()
def rollout(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Config of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings: a.b=value.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Ranks; rollout.tp of them an engine.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a side.")] = 8,
    prompt_tokens: Count = 64,
    median_tokens: Annotated[float, typer.Option(min=1, help="Median response length.")] = 16.0,
    sigma: Annotated[float, typer.Option(min=0, help="Deviation of the log length.")] = 1.0,
    rounds: Rounds = 3,
) -> None:
    """Measure generation where the lengths of responses differ: as it is, with the longest first,
    and with partial rollouts (rollout.tokens_per_round)."""
    with shown_once():
        loaded = load_config(config, overrides or [])

    def run() -> None:
        from megatron_qlrl.bench.rollout import bench_rollout

        figures = bench_rollout(
            loaded,
            steps=steps,
            prompt_tokens=prompt_tokens,
            median_tokens=median_tokens,
            sigma=sigma,
            rounds=rounds,
        )
        if read_ranks().rank == 0:
            _print(figures)

    on_ranks(sys.argv[1:], processes, check=lambda world_size: None, run=run)


def _print(figures: dict[str, Any]) -> None:
    typer.echo(json.dumps(figures, indent=1))
