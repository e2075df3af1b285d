"""`qlrl slurm`: the commands that the batch scripts in slurm/ call before and after a run."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_qlrl.cli.train import ConfigPath, Overrides, check_command, machine_report
from megatron_qlrl.config import checks
from megatron_qlrl.config.load import load_config
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.platform.env import read_ranks

app = typer.Typer(help="Called by the batch scripts in slurm/.", no_args_is_help=True)


@app.command()
def check(
    command: Annotated[Literal["sft", "rl", "eval"], typer.Argument()],
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[str, typer.Option(help="Names, comma-separated, in rank order.")] = "",
    tasks: Annotated[int, typer.Option(min=1, help="Ranks of the run.")] = 1,
) -> None:
    """Check the input, and whether the nodes fit together; one task on each node, before a run."""
    from megatron_qlrl.launch.slurm import check_nodes

    def prepare() -> tuple[Path, int]:
        loaded = load_config(config, overrides or [])
        check_command(command, loaded, tasks)
        saves = command != "eval"
        return Path(loaded.run.dir), checks.checkpoint_bytes(loaded.model.path) if saves else 0

    names = nodes.split(",") if nodes else ["this node"]
    versions = {k: v for k, v in machine_report().items() if k != "device"}
    problems = check_nodes(
        prepare, names=names, tasks_per_node=-(-tasks // len(names)), versions=versions
    )
    leads = read_ranks().rank == 0
    if problems and leads:
        raise ConfigError("\n  ".join(problems))
    if problems:
        sys.exit(2)
    if leads:
        typer.echo(f"{len(names)} node(s) checked: {', '.join(names)}")


@app.command()
def after_failure(
    config: ConfigPath,
    overrides: Overrides = None,
    code: Annotated[int, typer.Option(help="Exit code of the run.")] = 1,
    limit: Annotated[int, typer.Option(min=1, help="Failures after which the job ends.")] = 3,
) -> None:
    """Count a failed run: exit code 0 if the job may be queued again, 2 if it failed too often
    without a new checkpoint."""
    from megatron_qlrl.launch.slurm import count_failure

    folder = Path(load_config(config, overrides or []).run.dir)
    count = count_failure(folder)
    if count >= limit:
        raise ConfigError(
            f"the run failed {count} times without a new checkpoint (exit code {code}) and is not "
            f"started again; the reason is further up in this log. When it is mended, submit the "
            f"job again: it goes on from {folder}"
        )
    typer.echo(f"qlrl: failure {count} of at most {limit} since the newest checkpoint")
