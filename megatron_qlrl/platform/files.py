"""Writes files that users name; what was there stays until the whole result is on disk.

a new file beside the target -> written -> synced -> renamed over the target
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from megatron_qlrl.errors import ConfigError


def check_output(out: Path, inputs: Iterable[Path] = ()) -> None:
    """Checks that `out` can be written; call it before expensive work.

    Raises:
        ConfigError: its folder does not exist or takes no files, `out` is a folder, or it is one
            of the `inputs` under whatever name (relative path, symbolic link, hard link).
    """
    for source in inputs:
        if _same(source, out):
            raise ConfigError(
                f"{out} cannot be written: it is the same file as the input {source}, which would "
                "be lost; name another output file"
            )
    if out.is_dir():
        raise ConfigError(f"{out} cannot be written: it is a folder; name a file")
    if _is_stream(out):
        return
    folder = _target(out).parent
    if not folder.is_dir():
        raise ConfigError(f"{out} cannot be written: {folder} is no folder; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{out} cannot be written: the folder {folder} takes no new files; name another place"
        )


def make_folder(folder: Path) -> None:
    """Makes `folder` and those above it.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"folder {str(folder)!r} cannot be made: {error}; name another place"
        ) from error


@contextmanager
def replaced(out: Path, *, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yields the path of a new, empty file to write. It takes the place of `out`, with the
    permissions of the file that was there, when the block has ended, and goes when the block has
    failed. Devices and pipes (/dev/stdout) are written directly.

    Raises:
        ConfigError: as `check_output`, or the disk does not take the file.
    """
    check_output(out, inputs)
    if _is_stream(out):
        yield out
        return
    target = _target(out)
    fresh = target.with_name(f".qlrl-{token_hex(8)}.tmp")
    try:
        fresh.touch(exist_ok=False)
        yield fresh
        if target.exists():
            fresh.chmod(target.stat().st_mode & 0o777)
        with fresh.open("rb") as written:
            os.fsync(written.fileno())
        fresh.replace(target)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written: {error.strerror or error}; free space there or name another "
            "place"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def _is_stream(out: Path) -> bool:
    """Returns whether this is a device or a pipe, which holds nothing that could be lost."""
    try:
        return out.exists() and not out.is_file() and not out.is_dir()
    except (OSError, ValueError):
        return False


def _target(out: Path) -> Path:
    """Returns the file behind symbolic links, so that the link itself stays."""
    try:
        return out.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null byte
        raise ConfigError(f"{str(out)!r} cannot be written: {error}") from error


def _same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except (OSError, ValueError):  # one of them does not exist: they differ, unless by name
        return _target(a) == _target(b)
