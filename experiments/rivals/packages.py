"""Packages that rivals need, imported when they are used."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from cads.errors import ConfigError


def import_package(module: str, package: str) -> Any:
    """The module called `module`, of the distribution `package`.

    Raises:
        ConfigError: if it is not installed, naming the extra.
    """
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"this rival needs {package} ({error}): pip install 'cads-select[rivals]'") from error


def installed_version(package: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of packages while the block runs, no warnings of Python, and no messages of the level INFO."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """The global draws of numpy and torch, which packages use, come from `seed` while the block runs, which is quiet.

    They go on as before afterwards.
    """
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
