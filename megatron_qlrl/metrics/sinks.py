"""Writes metrics to the console, `metrics.jsonl`, TensorBoard and wandb, and rollouts to a log.

`metrics.jsonl` is the record: each call of `log` adds one line, which is on disk before `log`
returns. A run that resumes drops the lines after its checkpoint, because it repeats those steps.
"""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from megatron_qlrl.config.schema import LoggingConfig
from megatron_qlrl.errors import ConfigError

CONSOLE_METRICS = (
    ("critic/rewards/mean", "reward"),
    ("actor/pg_loss", "pg_loss"),
    ("sft/nll", "loss"),
    ("actor/entropy", "entropy"),
    ("actor/grad_norm", "grad_norm"),
    ("actor/lr", "lr"),
    ("response_length/mean", "response"),
    ("timing_s/step", "s"),
    ("perf/throughput", "tok/s"),
)
"""The metrics that the console line of a step shows if they are present, with their short names."""


class Sink(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes a run's metrics; on ranks other than 0 use `Tracker.silent()`, which writes nothing.

    Args:
        run_dir: the run's folder; None for a tracker without any output.
        resolved: the whole configuration as plain data, for wandb.
        state: `state_dict()` from the checkpoint the run resumes from; None for a new run, which
            renames the record that an earlier run left in the folder.

    Raises:
        ConfigError: logging.wandb is online and wandb cannot be reached.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        config: LoggingConfig,
        run_name: str,
        resolved: Mapping[str, Any],
        state: Mapping[str, Any] | None,
    ) -> None:
        self._run_dir = run_dir
        self._step = int(state["step"]) if state else -1
        self._lines = 0
        self._sinks: list[Sink] = []
        self._wandb_id: str | None = state["wandb_id"] if state else None
        if run_dir is None:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        if state is None:
            _move_aside(run_dir)
        else:
            self._lines = _rewind(run_dir, self._step, lines=state["lines"])
        self._sinks += [ConsoleSink(), JsonlSink(run_dir / "metrics.jsonl")]
        if config.tensorboard:
            self._sinks.append(TensorBoardSink(run_dir / "tensorboard", next_step=self._step + 1))
        if config.wandb != "off":
            wandb_sink = WandbSink(run_dir, config, run_name, resolved, run_id=self._wandb_id)
            self._wandb_id = wandb_sink.run_id
            self._sinks.append(wandb_sink)

    @classmethod
    def silent(cls) -> "Tracker":
        """A tracker that writes nothing."""
        return cls(
            None, config=LoggingConfig.model_validate({}), run_name="", resolved={}, state=None
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a step's `metrics` (verl's names); steps must not decrease."""
        assert step >= self._step, f"step {step} after step {self._step}"
        self._step = step
        self._lines += 1
        for sink in self._sinks:
            sink.log(step, metrics)

    def rollouts(self, step: int, records: list[dict[str, Any]]) -> None:
        """Appends records to `rollouts/step_000123.jsonl`, one JSON line each."""
        if self._run_dir is None or not records:
            return
        folder = self._run_dir / "rollouts"
        folder.mkdir(exist_ok=True)
        with (folder / f"step_{step:06d}.jsonl").open("a", encoding="utf-8") as stream:
            for record in records:
                stream.write(json.dumps(_plain(record), ensure_ascii=False) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for the checkpoint. Only rank 0's holds the number of lines in the
        record and wandb's run id."""
        return {"step": self._step, "lines": self._lines, "wandb_id": self._wandb_id}

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []


class ConsoleSink:
    """Prints one compact line per call."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._console.print(console_line(step, metrics), soft_wrap=True, highlight=False)

    def close(self) -> None:
        pass


class JsonlSink:
    """Writes the record; each line is flushed and synced, so that kill -9 loses nothing."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._stream.write(json.dumps({"step": step, **_plain(metrics)}) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        # Closing retries a line that did not fit on a full disk; `log` has raised for it already.
        with suppress(OSError):
            self._stream.close()


class TensorBoardSink:
    def __init__(self, folder: Path, *, next_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run wrote beyond the checkpoint.
        self._writer = SummaryWriter(str(folder), purge_step=next_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Writes to a wandb run, which is resumed under its id; wandb ignores steps it has already."""

    def __init__(
        self,
        run_dir: Path,
        config: LoggingConfig,
        run_name: str,
        resolved: Mapping[str, Any],
        *,
        run_id: str | None,
    ) -> None:
        import wandb
        from wandb.errors import Error as WandbError

        offline = config.wandb == "offline"
        try:
            self._run = wandb.init(
                project=config.project,
                name=run_name,
                dir=str(run_dir),
                config=dict(resolved),
                mode="offline" if offline else "online",
                id=run_id,
                resume="allow" if run_id else None,
                settings=wandb.Settings(console="off", silent=offline),
            )
        except WandbError as error:
            raise ConfigError(
                f"logging.wandb={config.wandb}: wandb did not start: {error}; log in with "
                "`wandb login`, or set logging.wandb=offline and run `wandb sync` later"
            ) from error

    @property
    def run_id(self) -> str:
        return self._run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def console_line(step: int, metrics: Mapping[str, float]) -> str:
    """Returns `step 12  reward 0.531  grad_norm 0.42`; evaluation scores (`val...`) keep their
    names. A step with neither shows its first six metrics."""
    shown = [(short, metrics[name]) for name, short in CONSOLE_METRICS if name in metrics]
    shown += [(name, value) for name, value in metrics.items() if name.startswith("val")]
    shown = shown or list(metrics.items())[:6]
    return "  ".join([f"step {step}", *(f"{name} {value:.4g}" for name, value in shown)])


def _move_aside(run_dir: Path) -> None:
    """Renames the record of an earlier run: `metrics.jsonl` becomes `metrics.jsonl.1`."""
    for path in (run_dir / "metrics.jsonl", run_dir / "rollouts"):
        if path.exists():
            path.rename(_unused(path))


def _rewind(run_dir: Path, step: int, *, lines: int) -> int:
    """Keeps the first `lines` lines of the record, and the rollouts up to `step`. Returns how many
    lines are kept, which are fewer if somebody deleted some."""
    record, rollouts = run_dir / "metrics.jsonl", run_dir / "rollouts"
    kept: list[str] = []
    if record.exists():
        kept = record.read_text(encoding="utf-8").splitlines()[:lines]
        part = record.with_suffix(".part")
        with part.open("w", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in kept)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(record)
    for file in rollouts.glob("step_*.jsonl"):
        if int(file.stem.removeprefix("step_")) > step:
            file.unlink()
    return len(kept)


def _unused(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return aside


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` ready for JSON: NaN and infinity become None, numpy's scalars Python's."""
    plain = {k: v.item() if hasattr(v, "item") else v for k, v in values.items()}
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()
    }
