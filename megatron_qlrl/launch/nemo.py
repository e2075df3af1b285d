"""NeMo-Run recipes: warm-up SFT -> RL -> evaluation -> export as one Experiment.

Imported in NeMo-Run's own environment (requirements/launch.txt), which has none of the packages
that training needs; the stages run in the training environment or container.
"""

import shlex
from collections.abc import Sequence
from typing import Any

import nemo_run as run  # pyright: ignore[reportMissingImports]

SIGNAL = "USR1@300"
"""To the program itself: NeMo-Run's batch script waits in the foreground and would pass on nothing.
The time must suffice for one training step and a checkpoint."""


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
    """One process for each GPU.

    Args:
        container: image for pyxis; None runs the stages in the environment of their `python`.
        tunnel: `run.SSHTunnel(...)` from outside; None on the cluster's login node, where the home
            of NeMo-Run (`nemo_run.config.set_nemorun_home`) must be a folder that all nodes see.
        retries: how often a stage comes back, after its time was up or a failure. NeMo-Run counts
            restarts, whatever the exit code.
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
        # Variables are written unquoted into the batch script, so this one is read there; no
        # secrets therefore. NeMo-Run's srun kills all ranks with the first one that ends badly,
        # which would cut off what the others still write when they stop together.
        env_vars={"MASTER_ADDR": "$head_node_ip"},
        srun_args=["--kill-on-bad-exit=0"],
    )


def local_executor() -> Any:
    """This machine; a stage starts its own processes, one for each GPU."""
    return run.LocalExecutor()


def stages(
    config: str, out: str, *, settings: Sequence[str] = (), sft_settings: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Arguments of `qlrl` by stage, in their order.

    Args:
        config: YAML file in the repository.
        out: absolute folder that all nodes see: every stage has a copy of the code of its own.
        settings: of all stages that take a config; `sft_settings` of the warm-up besides.
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
    """Adds one task a stage, each waiting for the success of the one before.

    Args:
        python: of the training environment, as the nodes (or the container) know it.
    """
    previous: list[str] = []
    for name, argv in commands.items():
        command = shlex.join([python, "-m", "megatron_qlrl", *argv])
        # exec: the signals are for Python.
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
