"""The run that a new run continues: which checkpoint it is, and whether this run can start from it.

first start   run.parent -> its newest whole checkpoint, or that of a step -> weights, optimizer
              state, statistics of prompts -> the same Parent in every checkpoint of this run
later start   the Parent of this run's own checkpoint; the other run may be gone by then
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_qlrl.config.run_folder import (
    checkpoint_of,
    named_checkpoints,
    split_parent,
    step_of,
)
from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.parallel.collectives import gather_objects, on_all_ranks
from megatron_qlrl.train.fingerprint import MODEL_CONTENTS, ROWS
from megatron_qlrl.weights.checkpoint_folder import digest_of, read_state, taking_up, torn

_COMMANDS = ("rl", "sft")
_KIND = "policy.distributed_optimizer"


@dataclass(frozen=True)
class Parent:
    """A checkpoint of another run.

    Attributes:
        run: that run's folder, as an absolute path of the time of the first start.
        step: its steps done.
        manifest: sha256 of its manifest.json, which names that of each of its files.
    """

    run: str
    step: int
    manifest: str

    @property
    def setting(self) -> str:
        """What run.parent says to start from it once more."""
        return f"{self.run}:{self.step}"

    @property
    def checkpoint(self) -> Path:
        return checkpoint_of(Path(self.run), self.step)

    def state(self) -> dict[str, Any]:
        """What the run's checkpoints hold of it."""
        return asdict(self)

    def fact(self) -> str:
        """The same for the model card, which names no folder of this machine."""
        return (
            f"{Path(self.run).name} at step {self.step} (sha256 of that checkpoint's "
            f"manifest.json: {self.manifest})"
        )


def find_parent(config: Config, *, warn: Callable[[str], None]) -> Parent | None:
    """Returns the checkpoint that `run.parent` names, if it names one; collective.

    Args:
        warn: gets a line for each checkpoint that is passed over.

    Raises:
        ConfigError, CheckpointError: there is no whole one (every rank).
    """
    text = config.run.parent
    if text is None:
        return None
    parent = on_all_ranks(lambda: _whole_one(text, warn) if dist.get_rank() == 0 else None)
    return gather_objects(parent)[0]


def _whole_one(text: str, warn: Callable[[str], None]) -> Parent:
    paths = named_checkpoints(text)
    for path in reversed(paths):
        problem = torn(path)
        if problem is None:
            run = path.absolute().parent.parent
            return Parent(str(run), step_of(path), digest_of(path / "manifest.json"))
        if split_parent(text)[1] is None:
            warn(f"checkpoint {path} is passed over: {problem}")
        else:
            raise CheckpointError(
                f"run.parent: checkpoint {path} is not whole: {problem}; name another step, or "
                "copy it again from where it was written"
            )
    raise CheckpointError(
        f"run.parent: no checkpoint of {paths[0].parent.parent} is whole; copy one again from "
        "where it was written"
    )


def parent_of(own: Path, config: Config) -> Parent | None:
    """Returns the parent that a run's own checkpoint names, or None if it began by itself.

    Raises:
        CheckpointError: `run.parent` names another one.
    """
    with taking_up(own):
        saved = read_state(own).get("parent")
        parent = Parent(**saved) if saved is not None else None
    if config.run.parent is None:
        return parent
    run, step = split_parent(config.run.parent)
    same = parent is not None and Path(parent.run) == run.absolute() and step in (None, parent.step)
    if not same:
        began = "by itself" if parent is None else f"from {parent.setting}"
        raise CheckpointError(
            f"run.parent: {config.run.parent} is not where this run began: {own} is of a run that "
            f"began {began}. Leave run.parent (--from) away to go on with it, or set run.dir to a "
            "new folder"
        )
    return parent


def with_parent(config: Config, parent: Parent | None) -> Config:
    """Returns the config with the very checkpoint in `run.parent`, as the run records it."""
    text = parent.setting if parent is not None else None
    return config.model_copy(update={"run": config.run.model_copy(update={"parent": text})})


def check_fit(path: Path, state: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Checks that a run can start from another run's checkpoint: it is of the same model, in
    weights and optimizer of the same kind. Everything else may differ.

    Args:
        path, state: the checkpoint, and its state.
        now: the fingerprint of the run that starts.

    Returns:
        A line on what could not be compared, or "".

    Raises:
        CheckpointError: it cannot.
    """
    with taking_up(path):
        command = state["command"]
        if command not in _COMMANDS:
            raise CheckpointError(
                f"run.parent: {path} is of `qlrl {command}`, and a run starts from one of "
                "`qlrl rl` or `qlrl sft`; export it (`qlrl export`), and set model.path to that "
                "folder"
            )
        differs = []
        if state["dtype"] != now["dtype"]:
            differs.append(f"model.dtype: {state['dtype']} -> {now['dtype']}")
        saved = state.get("fingerprint")
        if saved is not None:
            there, here = saved["contents"], now["contents"]
            differs += [name for name in MODEL_CONTENTS if there.get(name, 0) != here[name]]
            kinds = [_meaning(fingerprint).get(_KIND) for fingerprint in (saved, now)]
            if kinds[0] != kinds[1]:
                differs.append(f"{_KIND}: {kinds[0]} -> {kinds[1]}")
    if differs:
        raise CheckpointError(
            f"run.parent: this run cannot start from {path}: {'; '.join(differs)} must be the "
            f"same. Take the model's settings (model.path, model.dtype, {_KIND}) from the "
            f"config.yaml of {path.parent.parent}"
        )
    if saved is None:
        return f"{path} does not say which model and data it was trained with; not compared"
    return ""


def same_rows(state: Mapping[str, Any], rows: str) -> bool:
    """Returns whether a checkpoint's run trained on the rows of this digest."""
    return state.get("fingerprint", {}).get("contents", {}).get(ROWS) == rows


def _meaning(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that may not change: of the run or, in RL, of its first phase."""
    phases = fingerprint["phases"]
    return fingerprint["meaning"] | (phases[0]["meaning"] if phases else {})
