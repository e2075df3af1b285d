"""`qlrl export | import`: Megatron checkpoints and Hugging Face folders."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_qlrl.cli.ranks import on_ranks
from megatron_qlrl.config import checks
from megatron_qlrl.config.folder import check_folder
from megatron_qlrl.config.shape import read_shape
from megatron_qlrl.errors import CheckpointError, ConfigError


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, or a run's folder.")],
    out: Annotated[Path, typer.Argument(help="New Hugging Face folder.")],
) -> None:
    """Write a checkpoint as a Hugging Face folder with a model card."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"checkpoint folder {checkpoint} does not exist")
    _must_be_new(out)
    from megatron_qlrl.commands import run_export

    run_export(checkpoint, out)


def import_model(
    hf_folder: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    out: Annotated[Path, typer.Argument(help="New checkpoint folder.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel size.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline parallel size.")] = 1,
) -> None:
    """Write a Hugging Face model as a Megatron checkpoint."""

    def check(_: int) -> None:
        shape = read_shape(hf_folder, rope_scaling=None)
        check_folder(hf_folder, shape)
        checks.check_split(shape, tp=tp, pp=pp)
        _must_be_new(out)

    def run() -> None:
        from megatron_qlrl.commands import run_import

        run_import(hf_folder, out, tp, pp)

    argv = ["import", str(hf_folder), str(out), f"--tp={tp}", f"--pp={pp}"]
    on_ranks(argv, tp * pp, check=check, run=run)


def _must_be_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; name a new folder or remove it")
