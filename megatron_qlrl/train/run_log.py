"""The tracker of a run, which only rank 0 writes, and what a refusing disk means for all ranks."""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_qlrl import __version__
from megatron_qlrl.config.load import save_config
from megatron_qlrl.config.schema import Config
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.metrics.sinks import Tracker
from megatron_qlrl.parallel.collectives import on_all_ranks
from megatron_qlrl.platform.device import device_name
from megatron_qlrl.platform.machine import commit, versions
from megatron_qlrl.reward.certificate import FILE

T = TypeVar("T")


class RunLog:
    """What a run writes into its folder beside checkpoints. Methods are collective, but
    `state_dict` and `close`."""

    def __init__(self, config: Config, *, is_writer: bool) -> None:
        """`config` is that of the whole run. Until `open` nothing is tracked."""
        self._config, self._is_writer = config, is_writer
        self._folder = Path(config.run.dir)
        self._tracker = Tracker.silent()

    def record_start(self, *, world_size: int) -> None:
        """Writes the resolved config of the run, a copy of its judge's certificate, and a line for
        this start: which code and packages, on how many ranks and which device. Call it once it is
        known that the run goes on: a refused run leaves nothing."""

        def write() -> None:
            save_config(self._config, self._folder / "config.yaml")
            judge = self._config.reward.judge
            if judge is not None and judge.certificate is not None:
                certificate = Path(judge.certificate).read_bytes()
                (self._folder / FILE).write_bytes(certificate)
            start = {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "version": __version__,
                "commit": commit(),
                "world_size": world_size,
                "device": device_name(),
                **versions(),
            }
            with (self._folder / "starts.jsonl").open("a") as stream:
                stream.write(json.dumps(start) + "\n")

        self._on_disk(write)

    def open(self, state: Mapping[str, Any] | None) -> None:
        """Starts the tracker; `state` is that of the checkpoint a run resumes from."""
        tracker = partial(
            Tracker,
            self._folder,
            config=self._config.logging,
            run_name=self._config.run.name,
            resolved=self._config.model_dump(mode="json"),
            state=state,
        )
        self._tracker = self._on_disk(tracker) or self._tracker

    def write(self, write: Callable[[Tracker], None]) -> None:
        """Runs `write` with the tracker on the writer.

        Raises:
            ConfigError: the disk refuses (every rank).
        """
        self._on_disk(lambda: write(self._tracker))

    def state_dict(self) -> dict[str, Any]:
        return self._tracker.state_dict()

    def close(self) -> None:
        self._tracker.close()

    def _on_disk(self, work: Callable[[], T]) -> T | None:
        def guarded() -> T | None:
            if not self._is_writer:
                return None
            try:
                return work()
            except OSError as error:
                raise ConfigError(
                    f"run.dir {self._folder} cannot be written ({error}); free space or set "
                    "run.dir elsewhere, then start again: the run resumes"
                ) from error

        return on_all_ranks(guarded)
