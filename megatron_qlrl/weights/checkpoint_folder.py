"""Tells whether a checkpoint folder is whole, and reads what it holds beside the tensors."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_qlrl.config.schema import PolicyConfig
from megatron_qlrl.errors import CheckpointError, ConfigError
from megatron_qlrl.platform.env import PICKLED_STATE, may_unpickle_state
from megatron_qlrl.weights.stored import FILES, StoredWeights, open_weights, read_object

FORMAT = 2
"""Version of a checkpoint's contents. It grows when older checkpoints cannot be read any more."""

_STATE_TYPES = {
    "format": int, "command": str, "step": int, "version": int, "dtype": str, "facts": dict,
    "sampler": dict, "evaluation": dict, "monitor": dict, "tracker": dict, "parent": dict,
    "trainer": dict,
}  # fmt: skip
"""Types that values in state.json must have. Whoever saved a dict checks what is in it."""

UNFIT = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What code raises that uses values of another shape than was saved."""


def read_state(path: Path) -> dict[str, Any]:
    """Returns what was saved beside model and optimizer (not collective).

    Raises:
        CheckpointError: it cannot be read, or another version of this package wrote it.
    """
    try:
        state = _typed_state(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise _unfit(path, error) from error
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {state.get('format', 1)}, this version of megatron_qlrl "
            f"reads {FORMAT}; go on with the version that wrote it (a run's starts.jsonl names its "
            "commits), or export it there and start from the Hugging Face folder"
        )
    return state


@contextmanager
def taking_up(path: Path) -> Iterator[None]:
    """A block that uses a checkpoint's state. If values do not have the shape that was saved, the
    checkpoint is at fault.

    Raises:
        CheckpointError: instead of the KeyError or similar error that they caused.
    """
    try:
        yield
    except UNFIT as error:
        raise _unfit(path, error) from error


def check_resumable(policy: PolicyConfig) -> None:
    """Checks that the run may read its own checkpoints again.

    Raises:
        ConfigError: delayed FP8 scaling, without the user's leave to unpickle its state.
    """
    if policy.fp8 != "off" and policy.fp8_recipe == "delayed" and not may_unpickle_state():
        raise ConfigError(
            "policy.fp8_recipe=delayed keeps a pickle in each checkpoint, which could run any code "
            f"where it is read, so that the run could not resume. Set {PICKLED_STATE}=1 in the "
            "environment if run.dir holds checkpoints of your own alone, or set another "
            "policy.fp8_recipe (blockwise or tensorwise)"
        )


def is_checkpoint(folder: Path) -> bool:
    """Returns whether the folder is a checkpoint, whole or not; a run's folder is not one."""
    return any((folder / name).exists() for name in ("state.json", "manifest.json"))


def torn(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint folder, or None if it is whole."""
    try:
        return _mismatch(folder, read_object(folder / "manifest.json"))
    except FileNotFoundError:
        return "it has no manifest.json (an interrupted save)"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {first_line(error)}"


def _mismatch(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    for name in ("state.json", *(f"weights/{name}" for name in FILES)):
        if name not in manifest:
            return f"manifest.json does not name {name}"
    for name, digest in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if digest_of(folder / name) != digest:
            return f"{name} does not match its checksum"
    _typed_state(folder)
    return None


def _typed_state(folder: Path) -> dict[str, Any]:
    """Returns state.json. Raises ValueError if it is not a state, OSError if it is unreadable."""
    state = read_object(folder / "state.json")
    for name in state.keys() & _STATE_TYPES.keys():
        if type(state[name]) is not _STATE_TYPES[name]:
            raise ValueError(
                f"state.json holds a {type(state[name]).__name__} as {name}, "
                f"expected {_STATE_TYPES[name].__name__}"
            )
    return state


def open_checkpoint(path: Path) -> tuple[dict[str, Any], StoredWeights]:
    """Returns a checkpoint's state and its weights, whose tensors are not read yet (not
    collective).

    Raises:
        CheckpointError: this rank cannot see it, or it holds what no checkpoint holds.
    """
    state = read_state(path)
    try:
        return state, open_weights(path / "weights")
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} cannot be read ({first_line(error)}); run.dir must be on a disk "
        "that all machines of the run share"
    )


def _unfit(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} does not hold the state that this run needs ({first_line(error)}); "
        "it was changed after it was written. Remove its folder to go on from an older one"
    )


def digest_of(path: Path) -> str:
    """Returns the sha256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """Returns an error's type and the first line of its message, for a message of our own."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
