"""The range of Megatron-Core that megamask runs with.

The rooms that use Megatron-Core import this file first, so another version is one message instead
of a fault inside Megatron. Version 0.14 and 0.15 shard optimizer state in another way. What differs
between the versions of the range is in megamask/parallel/megatron_versions.py.
"""

from __future__ import annotations

import re
from importlib import metadata

from megamask.errors import ConfigError

PACKAGE = "megatron-core"
LOWEST, BELOW = (0, 16), (0, 20)  # as in pyproject.toml
RANGE = f">={LOWEST[0]}.{LOWEST[1]},<{BELOW[0]}.{BELOW[1]}"


def installed_version() -> str | None:
    """The version of Megatron-Core, also of a source tree on the path; None: there is none."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        pass
    try:
        from megatron.core.package_info import __version__
    except ImportError:
        return None
    return str(__version__)


def check_megatron() -> None:
    """Check the installed version.

    Raises:
        ConfigError: Megatron-Core is not installed, or its version lies outside ``RANGE``.
    """
    found = installed_version()
    numbers = re.match(r"(\d+)\.(\d+)", found or "")
    if numbers and LOWEST <= (int(numbers[1]), int(numbers[2])) < BELOW:
        return
    raise ConfigError(PACKAGE, found, f"a version {RANGE}", f"pip install '{PACKAGE}{RANGE}'.")
