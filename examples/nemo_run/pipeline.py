"""Runs the whole method as one NeMo-Run experiment: warm-up SFT -> RL -> evaluation -> export.

Start it in NeMo-Run's own environment (see README.md), from the repository's root:

    python examples/nemo_run/pipeline.py local CONFIG OUT [KEY=VALUE ...]
    ACCOUNT=me NODES=4 python examples/nemo_run/pipeline.py slurm CONFIG OUT [KEY=VALUE ...]

CONFIG is a file in the repository; OUT is the absolute path of a folder that all nodes see. On a
cluster the four jobs are submitted at once and wait for each other; `dryrun` instead of `slurm`
shows the batch scripts.
"""

import os
import sys
from pathlib import Path

try:
    import nemo_run as run
    from nemo_run.config import set_nemorun_home

    from megatron_qlrl.launch import nemo
except ModuleNotFoundError as error:
    sys.exit(
        f"pipeline.py: no module {error.name}; start it in NeMo-Run's environment from the "
        "repository's root, with PYTHONPATH=$PWD: see examples/nemo_run/README.md"
    )

ROOT = Path(__file__).resolve().parents[2]


def main(where: str, config: str, out: str, *settings: str) -> None:
    env = os.environ
    set_nemorun_home(f"{out}/nemo_run")  # all nodes must see the tasks' scripts, code and logs
    container = env.get("CONTAINER")
    inside = "python" if container else str(ROOT / ".venv" / "bin" / "python")
    python = env.get("PYTHON", inside)
    mounts = [f"{out}:{out}", *filter(None, env.get("MOUNTS", "").split(","))]
    if where == "local":
        executor = nemo.local_executor()
    else:
        executor = nemo.slurm_executor(
            account=env["ACCOUNT"],
            partition=env.get("PARTITION"),
            nodes=int(env.get("NODES", "1")),
            tasks_per_node=int(env.get("TASKS_PER_NODE", "8")),
            gpus_per_node=int(env.get("GPUS_PER_NODE", env.get("TASKS_PER_NODE", "8"))),
            time=env.get("TIME", "24:00:00"),
            container=container,
            mounts=mounts,
        )
    with run.Experiment("qwenlong-l1") as experiment:
        commands = nemo.stages(config, out, settings=settings)
        nemo.add_stages(experiment, executor, commands, python=python)
        if where == "dryrun":
            experiment.dryrun()
        else:
            experiment.run(detach=where == "slurm")


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in ("local", "slurm", "dryrun"):
        sys.exit(__doc__)
    if sys.argv[1] != "local" and "ACCOUNT" not in os.environ:
        sys.exit("pipeline.py: set ACCOUNT to the Slurm account that the jobs run under")
    main(*sys.argv[1:])
