"""NeMo-Run recipes: warm-up SFT -> RL -> evaluation -> export as one Experiment.

Imported in NeMo-Run's own environment (requirements/launch.txt), which has none of the packages
that training needs; the stages run in the training environment or container.
"""

import shlex
from collections.abc import Sequence
from typing import Any

import nemo_run as run  # pyright: ignore[reportMissingImports]

SIGNAL = "USR1@300"
"""Slurm sends USR1 this many seconds before the end, enough for a training step and a checkpoint.
It goes to the program itself: NeMo-Run's batch script waits in the foreground and keeps them."""


def slurm_executor(
    *,
    account: str,
    nodes: int,
    tasks_per_node: int = 8,
    gpus_per_node: int | None = 8,
    time: str = "24:00:00",
    partition: str | None = None,
    container: str | None = None,
    mounts: Sequence[str] = (),
    tunnel: Any = None,
    retries: int = 10,
) -> Any:
    """Returns an executor that runs one process for each GPU.

    Args:
        container: image for pyxis; None runs the stages in the environment of their `python`.
        tunnel: `run.SSHTunnel(...)` from outside; None on the cluster's login node, where the home
            of NeMo-Run (`nemo_run.config.set_nemorun_home`) must be a folder that all nodes see.
        retries: how often a stage is restarted, after a failure or when its time was up. NeMo-Run
            counts restarts whatever the exit code.
    """
    return run.SlurmExecutor(
        account=account,
        partition=partition,
        nodes=nodes,
        ntasks_per_node=tasks_per_node,
        gpus_per_node=gpus_per_node,
        time=time,
        mem="0",
        signal=SIGNAL,
        container_image=container,
        container_mounts=list(mounts),
        tunnel=tunnel or run.LocalTunnel(job_dir=""),
        retries=retries,
        packager=run.GitArchivePackager(),
        # NeMo-Run writes variables unquoted into the batch script: the shell expands this one
        # there, and secrets must not be passed this way. Its srun kills all ranks when the first
        # ends badly, which would cut off what the others still write when they stop together.
        env_vars={"MASTER_ADDR": "$head_node_ip"},
        srun_args=["--kill-on-bad-exit=0"],
    )


def local_executor() -> Any:
    """Returns an executor for this machine; a stage starts its own processes, one for each GPU."""
    return run.LocalExecutor()


def stages(
    config: str, out: str, *, settings: Sequence[str] = (), sft_settings: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Returns the arguments of `qlrl` by stage, in the order in which the stages run.

    Args:
        config: YAML file in the repository.
        out: absolute path of a folder that all nodes see; every stage runs in its own copy of the
            repository.
        settings: settings for all stages that take a config.
        sft_settings: more settings for the warm-up alone.
    """
    return {
        "sft": ["sft", config, f"run.dir={out}/sft", *settings, *sft_settings],
        "rl": ["rl", config, f"run.dir={out}/rl", f"model.path={out}/sft/hf", *settings],
        "eval": ["eval", config, f"run.dir={out}/eval", f"model.path={out}/rl/hf", *settings],
        "export": ["export", f"{out}/rl", f"{out}/release"],
    }


def add_stages(
    experiment: Any, executor: Any, commands: dict[str, list[str]], *, python: str = "python"
) -> None:
    """Adds one task per stage; each waits until the one before has succeeded.

    Args:
        python: the training environment's Python, as the nodes (or the container) know it.
    """
    previous: list[str] = []
    for name, argv in commands.items():
        command = shlex.join([python, "-m", "megatron_qlrl", *argv])
        # With exec the signals reach Python instead of a shell.
        script = run.Script(inline=f"exec {command}\n")
        single = name == "export"
        task = experiment.add(
            script, executor=_for_one_task(executor) if single else executor.clone(), name=name,
            dependencies=previous,
        )  # fmt: skip
        previous = [task]


def _for_one_task(executor: Any) -> Any:
    one = executor.clone()
    if isinstance(one, run.SlurmExecutor):
        one.nodes = one.ntasks_per_node = 1
        one.gpus_per_node = min(1, one.gpus_per_node) if one.gpus_per_node else one.gpus_per_node
    return one
