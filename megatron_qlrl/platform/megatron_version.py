"""Says which versions of megatron-core this package runs with. No other file knows one.

The code uses only what both series have; where they differ, docs/architecture.md says how each
difference is met (section "Two versions of Megatron-core"). Nothing of torch or Megatron is loaded.
"""

import re
from importlib.metadata import PackageNotFoundError, distribution

from megatron_qlrl.errors import ConfigError

TESTED = {"0.16": 1, "0.19": 2}
"""Supported series, each with its patch version that all tests run with. Later patches of a series
are accepted, earlier ones are not."""


def check_megatron() -> None:
    """Raises ConfigError unless a supported megatron-core is installed."""
    tested = " and ".join(f"{series}.{patch}" for series, patch in TESTED.items())
    mend = f'this package is tested with {tested}: pip install "megatron-core==VERSION" (PyPI has '
    mend += "versions from 0.17 on for Python 3.12 and later only)"
    try:
        package = distribution("megatron-core")
    except PackageNotFoundError as error:
        raise ConfigError(f"megatron-core is not installed; {mend}") from error
    if not is_supported(package.version):
        raise ConfigError(
            f"megatron-core {package.version} ({package.locate_file('megatron')}) is not "
            f"supported; {mend}"
        )


def is_supported(version: str) -> bool:
    """Returns whether a release is of a supported series and at least the tested patch. Release
    candidates are not supported."""
    parts = re.fullmatch(r"(\d+\.\d+)\.(\d+)(\+.*|\.post\d+)?", version)
    return parts is not None and parts[1] in TESTED and int(parts[2]) >= TESTED[parts[1]]
