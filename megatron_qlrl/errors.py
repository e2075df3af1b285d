"""Errors that a user can mend, named by who must act.

Each message says what is wrong, where, and how to mend it. The command line prints the
message alone (no stack trace) and exits with code 2. Our own broken invariants are
`assert`s, never one of these.
"""

STOPPED = 85
"""Exit code of a run that was asked to stop and is saved; the same command continues it."""


class StopRequested(Exception):
    """The reason why a run stops early. It is no error: the run is saved first."""


class QlrlError(Exception):
    """Base of every error whose message is meant for the user."""


class ConfigError(QlrlError):
    """The configuration, the launch or the machine does not fit the request."""


class DataError(QlrlError):
    """An input file or row cannot be used."""


class RewardError(QlrlError):
    """Rewards cannot be computed reliably (for example the judge is gone)."""


class StabilityError(QlrlError):
    """A stability rule stopped the run."""


class SyncError(QlrlError):
    """Trainer and rollout engine disagree about the weights."""


class CheckpointError(QlrlError):
    """A checkpoint or model folder cannot be read or written."""


class KernelError(QlrlError):
    """This machine's kernels compute wrong values."""


class ReleaseError(QlrlError):
    """A model folder cannot be handed on as it is."""
