"""`qlrl`: checks the input, starts the ranks and runs the command. Only ranks load torch.

    qlrl rl CONFIG -> config, files, model and layout are checked -> ranks start -> run_rl

In: arguments and a config. Out: exit code 0; 2 and one line on stderr for a user's mistake; 85 for
a run that was asked to stop and is saved. Invariants: everything that can be checked without torch
is checked before a rank starts, and each message is shown once, however many ranks meet it.
Held by tests/unit/test_cli*.py and tests/integration/test_bad_input.py.
"""

import sys

import typer

from megatron_qlrl.cli import (
    behaviours,
    bench,
    compare,
    convert,
    data,
    judge,
    plan,
    release,
    report,
    reward,
    slurm,
    train,
)
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
app.command()(compare.compare)
app.command()(report.report)
app.command()(behaviours.behaviours)
app.command()(train.distill)
app.command()(convert.export)
app.command("import")(convert.import_model)
app.command()(train.check)
app.command()(plan.plan)
app.add_typer(data.app, name="data")
app.add_typer(judge.app, name="judge")
app.add_typer(reward.app, name="reward")
app.add_typer(release.app, name="release")
app.add_typer(slurm.app, name="slurm")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Runs the command line; the entry point of the console script."""
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
