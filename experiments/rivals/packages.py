"""Packages that rivals need, imported when they are used."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cads.errors import ConfigError


def import_package(module: str, package: str) -> Any:
    """The module called `module`, of the distribution `package`.

    Raises:
        ConfigError: if it is not installed, naming the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"this rival needs {package} ({error}): pip install 'cads-select[rivals]'") from error


def installed_version(package: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
