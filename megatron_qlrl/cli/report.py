"""`qlrl report`: one HTML file about a run or several."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders; curves are overlaid.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Default: RUN/report.html, or report.html here for several runs."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0, help="Price of a GPU (CPU process) for one hour.")
    ] = None,
) -> None:
    """Write a page about runs that have ended or are going on: cost, evaluations, curves, samples,
    settings. It opens from disk and loads nothing."""
    from megatron_qlrl.report.write import write_report

    target, size = write_report(runs, out, rate=rate)
    typer.echo(f"{target}: {size / 1e6:.2f} MB")
