"""`qlrl compare`: says by how much evaluations differ, and whether that means anything."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from megatron_qlrl.errors import ConfigError


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders (the newest evaluation counts), or files RUN/eval/NAME.json.",
        ),
    ],
    resamples: Annotated[int, typer.Option(min=100, help="Of the bootstrap.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Compare two or more evaluations by question, each with the first; then the paper's table."""
    from megatron_qlrl.evaluate import compare as comparing
    from megatron_qlrl.evaluate import paper

    if len(runs) < 2:
        raise ConfigError("name two runs or more: qlrl compare runs/base runs/rl")
    first, *others = scores = [comparing.read_run(path) for path in runs]
    compared = [
        comparing.compare(first, other, num_resamples=resamples, seed=seed) for other in others
    ]
    if not as_json:
        lines = [*comparing.comparison_lines(scores, compared), "", *paper.paper_lines()]
        typer.echo("\n".join(lines))
        return
    measured = [
        {"run": run.label, "scores": {name: run.mean(name) for name in run.scores}}
        for run in scores
    ]
    differences = [
        {
            "run": run.label,
            "minus": first.label,
            "by_benchmark": {
                name: asdict(result) | {"told_apart": result.told_apart}
                for name, result in result_by_name.items()
            },
        }
        for run, result_by_name in zip(others, compared, strict=True)
    ]
    published = {"source": paper.SOURCE, "columns": paper.COLUMNS, "table": paper.TABLE_4}
    shown = {"measured": measured, "differences": differences, "paper": published}
    typer.echo(json.dumps(shown, indent=1))
