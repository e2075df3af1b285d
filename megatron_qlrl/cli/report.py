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
    from megatron_qlrl.platform.files import replaced
    from megatron_qlrl.report.page import report_page
    from megatron_qlrl.report.read import read_runs

    read = read_runs(runs)
    target = out or (Path("report.html") if len(read) > 1 else read[0].folder / "report.html")
    page = report_page(read, rate=rate)
    with replaced(target) as fresh:
        fresh.write_bytes(page)
    typer.echo(f"{target}: {len(page) / 1e6:.2f} MB")
