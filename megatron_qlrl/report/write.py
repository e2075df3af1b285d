"""Writes reports: of the runs that a user names, and of a run that has just ended."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_qlrl.platform.files import replaced
from megatron_qlrl.report.page import report_page
from megatron_qlrl.report.read import read_with_parents

NAME = "report.html"
PATIENCE_S = 120


def write_report(
    folders: Sequence[Path], out: Path | None = None, *, rate: float | None = None
) -> tuple[Path, int]:
    """Writes the page about the runs in `folders` and those that they began from. Returns where it
    is and its size in bytes.

    Args:
        out: None for `report.html`, in the folder of a single run and here for several.
        rate: price of one process for one hour.

    Raises:
        DataError: a folder is no run, or the page would be too large.
        ConfigError: the page cannot be written.
    """
    runs = read_with_parents(folders)
    named = list({folder.resolve() for folder in folders})
    target = out or (named[0] / NAME if len(named) == 1 else Path(NAME))
    page = report_page(runs, rate=rate)
    with replaced(target) as fresh:
        fresh.write_bytes(page)
    return target, len(page)


def report_at_end(folder: Path) -> str | None:
    """Writes `report.html` into the folder of a run that has ended. Returns what went wrong, or
    None. A process of its own does it, so that nothing in it can end the run."""
    command = [sys.executable, "-m", "megatron_qlrl.report.write", str(folder)]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=PATIENCE_S,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1] if done.returncode else None


if __name__ == "__main__":
    write_report([Path(sys.argv[1])])
