"""What a card says of the training, read from the run's folder as it was at one step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_qlrl import __version__
from megatron_qlrl.config.schema import Config, ModelConfig
from megatron_qlrl.errors import DataError
from megatron_qlrl.release.base import base_name, is_release, licence
from megatron_qlrl.report.read import Evaluation, Run, flat, place, read_runs
from megatron_qlrl.train.fingerprint import use_of
from megatron_qlrl.weights.checkpoint_folder import digest_of

_NOT_SHOWN = ("evaluation.endpoint", "evaluation.every_steps", "reward.judge", "stability")
"""Settings, or sections, that say nothing about the model, or name machines."""


def training_facts(config: Config) -> dict[str, Any]:
    """Returns what checkpoints keep for the card: what the run's folder does not tell."""
    folder = Path(config.model.path)
    return {
        "base model": config.model.name or base_name(folder),
        "licence": licence(folder),
        "from a release": is_release(folder),
        "software": f"megatron_qlrl {__version__}",
        "phases": ", ".join(f"{p.name} (<= {p.max_input_tokens})" for p in config.phases) or "none",
        "seed": config.run.seed,
    }


@dataclass(frozen=True)
class DataFile:
    """A file with training data; `rows` and `sha256` are None if it is not at hand any more."""

    name: str
    rows: int | None
    sha256: str | None


@dataclass(frozen=True)
class Record:
    """One training run up to a step.

    Attributes:
        facts: what the checkpoint says (`training_facts`); an older one says less.
        command: "rl", "sft", or "import" for weights that were only converted.
        run: the run's folder, cut at `steps_done`; None if it is not at hand.
        config: of `run`; None if it is not at hand or cannot be read.
    """

    facts: Mapping[str, Any]
    command: str
    steps_done: int
    run: Run | None

    @property
    def config(self) -> Config | None:
        return self.run.config if self.run else None

    @cached_property
    def evaluations(self) -> list[tuple[float, Evaluation]]:
        """Returns the evaluations up to here, each with the number of steps done before it: of the
        start, of phases' ends and of these very weights, for a run may make hundreds."""
        made = [(self._step_of(e), e) for e in (self.run.evaluations if self.run else ())]
        return [
            (step, e)
            for step, e in made
            if e.means
            and step <= self.steps_done
            and (step == self.steps_done or not e.name.startswith("step_"))
        ]

    @property
    def last_evaluation(self) -> Evaluation | None:
        """Returns the evaluation of these very weights, or None if there is none."""
        return next((e for step, e in self.evaluations if step == self.steps_done), None)

    def _step_of(self, evaluation: Evaluation) -> float:
        if self.command == "sft" and evaluation.name == "sft":
            return self.run.steps_done if self.run else math.inf
        return place(evaluation.name, self.config)[0]

    @cached_property
    def data_files(self) -> list[DataFile]:
        """Returns the files with the training data, as they are now."""
        data = self.config.data if self.config else None
        names = (
            () if data is None else data.sft_files if self.command == "sft" else data.train_files
        )
        return [_data_file(Path(name)) for name in names]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Returns the settings that made the model what it is and differ from the defaults."""
        if self.config is None:
            return {}
        defaults = flat(Config(model=ModelConfig(path="")).model_dump(mode="json"))
        own = flat(self.config.model_dump(mode="json", exclude={"phases"}))
        others = {"sft": "rl", "rl": "sft"}.get(self.command)
        return {
            name: value
            for name, value in own.items()
            if name == "run.seed"
            or (value != defaults.get(name) and not name.startswith(_NOT_SHOWN)
                and name.partition(".")[0] != others and use_of(name) not in ("free", others))
        }  # fmt: skip


def read_record(facts: Mapping[str, Any], *, command: str, steps_done: int, folder: Path) -> Record:
    """Returns the record of the run in `folder`, which need not be there any more."""
    run = None
    try:
        if (folder / "config.yaml").is_file():
            run = _until(read_runs([folder])[0], steps_done)
    except DataError:
        pass  # the card then says that the run's folder was not at hand
    return Record(facts, command, steps_done, run)


def _until(run: Run, steps_done: int) -> Run:
    return replace(
        run,
        steps=[line for line in run.steps if line["step"] < steps_done],
        tests=[line for line in run.tests if line["steps_done"] <= steps_done],
    )


def last_part(path: str) -> str:
    """Returns the last part of what may be a path: a card names no folder of this machine."""
    return PurePath(path).name


def _data_file(path: Path) -> DataFile:
    try:
        return DataFile(path.name, pq.read_metadata(path).num_rows, digest_of(path))
    except (OSError, pa.ArrowException):
        return DataFile(path.name, None, None)
