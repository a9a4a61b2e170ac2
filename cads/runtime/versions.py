"""Versions of the libraries on which results depend."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("cads-select", "torch", "numpy", "accelerate")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries on which results depend."""
    installed = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed
