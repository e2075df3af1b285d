"""Where a run's folder has its checkpoints, and which of them `run.parent` names (torch-free)."""

from pathlib import Path

from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import ConfigError

CHECKPOINTS = "step_" + "[0-9]" * 8
"""Pattern of the names of checkpoints."""


def checkpoint_name(step: int) -> str:
    """Returns the name of the folder of a checkpoint after `step` steps."""
    return f"step_{step:08d}"


def checkpoint_of(run: Path, step: int) -> Path:
    """Returns where a run has its checkpoint of a step, if there is one."""
    return run / "checkpoints" / checkpoint_name(step)


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, whole or not, from the oldest to the newest."""
    return sorted(folder.glob(CHECKPOINTS))


def checkpoints_of(run: Path) -> list[Path]:
    """Returns the checkpoints of a run, as `checkpoints_in`."""
    return checkpoints_in(run / "checkpoints")


def step_of(checkpoint: Path) -> int:
    """Returns the number of steps done at a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step_"))


def split_parent(text: str) -> tuple[Path, int | None]:
    """Returns folder and step of RUN:STEP; None for the step of RUN alone."""
    run, _, step = text.rpartition(":")
    if run and step.isascii() and step.isdecimal():
        return Path(run), int(step)
    return Path(text), None


def named_checkpoints(text: str) -> list[Path]:
    """Returns the checkpoints that RUN or RUN:STEP may stand for, from the oldest to the newest.

    Raises:
        ConfigError: there is none.
    """
    run, step = split_parent(text)
    if not run.is_dir():
        raise ConfigError(
            f"run.parent: there is no folder {run} (relative paths start at {Path.cwd()}); name "
            "the run.dir of a run, or RUN:STEP for one of its checkpoints"
        )
    everything = checkpoints_of(run)
    if not everything:
        raise ConfigError(
            f"run.parent: {run} has no checkpoint (checkpoints/step_*); name the run.dir of a run "
            "that has saved one. Weights without a run's state go into model.path"
        )
    chosen = [path for path in everything if step is None or step_of(path) == step]
    if not chosen:
        raise ConfigError(
            f"run.parent: {run} has no checkpoint of step {step}; it has those of "
            f"{', '.join(str(step_of(path)) for path in everything)}"
        )
    return chosen


def check_parent(config: Config) -> None:
    """Checks that a run which begins now finds what `run.parent` names. One that has checkpoints
    of its own goes on from those.

    Raises:
        ConfigError: it does not, or `run.parent` is the run itself.
    """
    parent, own = config.run.parent, Path(config.run.dir)
    if parent is None:
        return
    if split_parent(parent)[0].resolve() == own.resolve():
        raise ConfigError(
            f"run.parent: {parent} is run.dir itself. A run goes on without it: leave it (--from) "
            "away, or set run.dir to a new folder"
        )
    if not (config.checkpoint.resume and checkpoints_of(own)):
        named_checkpoints(parent)
