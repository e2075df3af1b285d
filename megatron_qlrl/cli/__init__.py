"""`qlrl`: checks the input, starts the ranks, runs the command. torch is loaded by ranks only.

    qlrl rl CONFIG -> config, files, model and layout are checked -> ranks start -> run_rl

Bad input ends here with one line on stderr and exit code 2, a run that was asked to stop with 85.
"""

import sys

import typer

from megatron_qlrl.cli import bench, convert, data, judge, plan, reward, slurm, train
from megatron_qlrl.cli.ranks import show
from megatron_qlrl.errors import STOPPED, QlrlError, StopRequested
from megatron_qlrl.platform.env import quiet_foreign_warnings, read_ranks

app = typer.Typer(
    help="Long-context reasoning RL on Megatron-core and vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train.sft)
app.command()(train.rl)
app.command("eval")(train.evaluate)
app.command()(train.distill)
app.command()(convert.export)
app.command("import")(convert.import_model)
app.command()(train.check)
app.command()(plan.plan)
app.add_typer(data.app, name="data")
app.add_typer(judge.app, name="judge")
app.add_typer(reward.app, name="reward")
app.add_typer(slurm.app, name="slurm")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point of the console script."""
    quiet_foreign_warnings()
    try:
        app()
    except QlrlError as error:
        show(error)
        sys.exit(2)
    except StopRequested as stopped:
        if read_ranks().rank == 0:
            print(f"qlrl: {stopped}; the run is saved: the same command goes on", flush=True)
        sys.exit(STOPPED)
