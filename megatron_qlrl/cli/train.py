"""`qlrl sft | rl | eval | check`: the commands that take a config."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_qlrl.cli.ranks import on_ranks, shown_once
from megatron_qlrl.config import checks
from megatron_qlrl.config.folder import check_folder
from megatron_qlrl.config.load import load_config
from megatron_qlrl.config.schema import Config
from megatron_qlrl.config.shape import read_shape
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.launch import local
from megatron_qlrl.launch.next_process import replace_process
from megatron_qlrl.platform.env import check_allocator, read_ranks, read_secret
from megatron_qlrl.platform.files import check_output
from megatron_qlrl.platform.machine import attention_kernel, package_version, versions
from megatron_qlrl.platform.megatron_version import check_megatron
from megatron_qlrl.platform.progress import Progress, foreign_messages_in

if TYPE_CHECKING:
    from megatron_qlrl.train.phases import Handover

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file, or a folder with config.yaml.")
]
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
        "that hold the layout. Ignored under torchrun and srun, which start the ranks.",
    ),
]


def sft(config: ConfigPath, overrides: Overrides = None, processes: Processes = None) -> None:
    """Warm up: supervised fine-tuning on data.sft_files."""
    _train("sft", config, overrides or [], processes)


def rl(
    config: ConfigPath,
    overrides: Overrides = None,
    processes: Processes = None,
    parent: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN[:STEP]",
            help="Run that a new run starts from: weights, optimizer state and statistics of "
            "prompts of its newest checkpoint, or of that of STEP. The same as run.parent.",
        ),
    ] = None,
) -> None:
    """Train by reinforcement learning, in phases of growing input length."""
    # Quoted, because YAML reads some texts with a colon as numbers.
    added = [] if parent is None else [f"run.parent={json.dumps(parent)}"]
    _train("rl", config, [*(overrides or []), *added], processes)


def evaluate(config: ConfigPath, overrides: Overrides = None, processes: Processes = None) -> None:
    """Score model.path, or the model of evaluation.endpoint, on data.eval_files."""
    with shown_once():
        loaded = load_config(config, overrides or [])
        world_size = max(processes or 1, read_ranks().world_size)
        if loaded.evaluation.endpoint is not None and world_size > 1:
            raise ConfigError(
                f"{world_size} processes, and evaluation.endpoint needs one, because its service "
                "runs the model; start one"
            )
    if loaded.evaluation.endpoint is not None:
        _check_files(loaded, "eval")
        checks.check_run_dir(loaded)
        _check_rewards(loaded)
        from megatron_qlrl.distill.endpoint import evaluate_endpoint

        evaluate_endpoint(loaded)
        return
    _train("eval", config, overrides or [], processes)


def distill(
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Parquet file to write.")],
    overrides: Overrides = None,
) -> None:
    """Write warm-up data: a teacher's correct answers to data.train_files. Continues when it is
    started again."""
    loaded = load_config(config, overrides or [])
    _check_files(loaded, "distill")
    from megatron_qlrl.distill.distill import output_files, run_distill

    for file in output_files(out):
        check_output(file, [config, *map(Path, loaded.data.train_files)])
    _check_rewards(loaded)
    run_distill(loaded, out)


def check(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]")] = None,
    overrides: Overrides = None,
    processes: Processes = None,
    sample: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of prompts to answer with model.path and show with their scores."
        ),
    ] = None,
) -> None:
    """Report what this machine offers; with CONFIG, check it as a run would."""
    if config is None:
        if sample is not None:
            raise ConfigError("--sample needs a CONFIG: qlrl check CONFIG --sample 4")
        _report_machine()
        return
    loaded = load_config(config, overrides or [])
    world = processes or _default_processes(loaded.phase_configs())

    def check_all(world_size: int) -> None:
        _report_machine()
        _check_config(loaded, world_size)
        typer.echo(f"{config}: fits {world_size} process(es) on this machine")

    def answer() -> None:
        rank = read_ranks().rank
        with TemporaryDirectory() as name, foreign_messages_in(Path(name) / "messages.log"):
            with Progress.of_rank(rank).doing("loading torch and Megatron-core"):
                from megatron_qlrl import commands

            assert sample is not None
            commands.run_sample(loaded, sample, Path(name))

    if sample is None:
        check_all(world)
        return
    if not any((loaded.data.train_files, loaded.data.eval_files, loaded.data.sft_files)):
        raise ConfigError("--sample needs data.train_files, data.eval_files or data.sft_files")
    argv = ["check", str(config), *(overrides or []), "--sample", str(sample)]
    on_ranks(argv, world, check=check_all, run=answer)


def _report_machine() -> None:
    for name, value in machine_report().items():
        typer.echo(f"{name:<20}{value}")
    check_megatron()


def _check_config(config: Config, world_size: int) -> None:
    """Checks a config as each command would for which the config names files or phases."""
    data = config.data
    uses: dict[checks.Command, tuple[object, ...]] = {
        "sft": data.sft_files,
        "rl": (*data.train_files, *config.phases),
        "eval": data.eval_files,
    }
    for command, used in uses.items():
        if used:
            _check_files(config, command)
    _check_layouts(config.phase_configs(), world_size=world_size, here=world_size)
    _check_rewards(config)


def machine_report() -> dict[str, str]:
    """Returns versions and devices by name, without loading any of the packages."""
    gpus = local.num_gpus()
    kernel = attention_kernel(gpu=bool(gpus))
    return {
        **versions(),
        "device": f"{gpus} GPU(s)" if gpus else "CPU (no GPU found)",
        "attention kernel": f"{kernel.name} ({kernel.why})",
        "transformer-engine": package_version("transformer-engine"),
        "apex": "present" if find_spec("apex") else "absent",
        "megatron_qlrl": package_version("megatron_qlrl"),
    }


def _train(command: checks.Command, path: Path, overrides: list[str], wanted: int | None) -> None:
    """Runs one of the three commands that take a config and run on ranks."""
    with shown_once():
        config = load_config(path, overrides)

    def check(world_size: int) -> None:
        check_command(command, config, world_size)

    def run() -> None:
        rank = read_ranks().rank
        messages = Path(config.run.dir) / "logs" / f"rank_{rank}.log"
        with foreign_messages_in(messages):
            with Progress.of_rank(rank).doing(
                f"loading torch and Megatron-core (messages of other packages: {messages})"
            ):
                from megatron_qlrl import commands

            runs: dict[str, Callable[[Config], Handover | None]] = {
                "sft": commands.run_sft,
                "rl": commands.run_rl,
                "eval": commands.run_eval,
            }
            handover = runs[command](config)
        if handover is not None:
            replace_process(
                handover.port,
                listener=handover.listener,
                longest_step_s=handover.longest_step_s,
                settings=["checkpoint.resume=true"],
            )

    processes = wanted or _default_processes(_phases(command, config))
    argv = [command, str(path), *overrides]
    on_ranks(argv, processes, check=check, run=run, saves=command in ("sft", "rl"))


def check_command(command: checks.Command, config: Config, world_size: int) -> None:
    """Checks all that can be checked before `world_size` ranks start.

    Raises:
        QlrlError: something does not fit. The message says what.
    """
    _check_files(config, command)
    # Under torchrun and srun the job may span machines, and how many ranks run here is not known.
    here = world_size if read_ranks().world_size == 1 else 1
    _check_layouts(_phases(command, config), world_size=world_size, here=here)
    checks.check_run_dir(config)
    if command != "sft" and local.num_gpus():
        check_allocator()
    _check_rewards(config)


def _check_layouts(phases: list[Config], *, world_size: int, here: int) -> None:
    """Checks the model and each phase's layout, for `world_size` ranks, `here` on this machine."""
    model = phases[0].model
    shape = read_shape(model.path, rope_scaling=model.rope_scaling)
    check_folder(model.path, shape)
    for phase in phases:
        checks.check_layout(phase, shape, world_size=world_size)
        checks.check_machine(phase, processes=here, num_gpus=local.num_gpus())


def _check_files(config: Config, command: checks.Command) -> None:
    checks.check_files(config, command)
    from megatron_qlrl.data.dataset import check_file

    data = config.data
    files = {"sft": data.sft_files, "eval": ()}.get(command, data.train_files)
    for file in files:
        check_file(Path(file), has_response=command == "sft")
    for file in data.eval_files:
        check_file(Path(file), has_response=False)


def _phases(command: checks.Command, config: Config) -> list[Config]:
    return config.phase_configs() if command == "rl" else [config]


def _check_rewards(config: Config) -> None:
    if config.reward.custom:
        from megatron_qlrl.reward.custom import check_own_rewards

        check_own_rewards(config.reward.custom)
    check_judge_of(config)


def check_judge_of(config: Config) -> None:
    """Checks that the config's judge has the certificate it demands, and that its servers answer.

    Raises:
        RewardError: it has not, or one does not.
    """
    judge = config.reward.judge
    if judge is not None:
        from megatron_qlrl.reward.certificate import check_certificate
        from megatron_qlrl.reward.judge import check_judge

        check_certificate(judge, max_no_verdict=config.reward.max_masked_share)
        check_judge(judge, key=read_secret(judge.api_key_env))


def _default_processes(configs: list[Config]) -> int:
    return local.num_gpus() or checks.smallest_world_size(configs)
