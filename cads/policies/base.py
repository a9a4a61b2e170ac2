"""Distributions over what to train on: masks of n items (Bernoulli) or mixture ratios of n sources.

The outer problem is min_s E_{m ~ p(.; s)} [ F(m) ]. A policy p(.; s) gives draws and their scores, from which
`cads.estimators.score_function` makes gradients in s; `Policy.step` then updates s.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from cads.errors import CadsError, CheckpointError, ConfigError
from cads.policies.simplex import Floats, blocks, finite_array
from cads.runtime.atomic_files import atomic_file

P = TypeVar("P", bound="Policy")

SCHEMA = 1
"""Version of the file that `Policy.save` writes."""

METADATA_KEY = "cads.policy"
"""Key of the JSON header in the metadata of the safetensors file."""


class Policy(ABC):
    """A distribution over draws of shape (n,), with one parameter per item, all in [0, 1].

    Items are what is selected: examples or sources. Only `step` changes the parameters, in place. All randomness
    comes from the generator given to `sample`.
    """

    _parameter: ClassVar[str]
    _settings: ClassVar[tuple[str, ...]]

    def __init__(self, parameters: ArrayLike) -> None:
        values = finite_array(self._parameter, parameters).copy()
        if values.min() < 0 or values.max() > 1:
            raise ConfigError(
                f"{self._parameter} must be in [0, 1], got {values.min()} to {values.max()}: project them"
            )
        self._values: Floats = values

    @property
    def n(self) -> int:
        """The number of items."""
        return self._values.size

    @abstractmethod
    def sample(self, count: int, rng: np.random.Generator) -> NDArray[Any]:
        """Draw `count` independent draws, shape (count, n)."""

    @abstractmethod
    def log_prob(self, draws: NDArray[Any]) -> Floats:
        """Log-probability (or log-density) in nats, draws (K, n) -> (K,); -inf where impossible."""

    @abstractmethod
    def score(self, draws: NDArray[Any]) -> Floats:
        """Gradient of `log_prob` in the parameters, draws (K, n) -> (K, n), in nats per unit of parameter."""

    @abstractmethod
    def entropy(self) -> float:
        """Entropy of one draw in nats (differential where draws are continuous)."""

    @abstractmethod
    def _project(self, values: Floats) -> Floats:
        """Return the nearest parameters (n,) that this policy admits; `values` may be overwritten."""

    def step(self, gradient: ArrayLike, size: float) -> None:
        """Projected descent: parameters <- projection(parameters - size * gradient), in place.

        Raises:
            ConfigError: if the gradient is not finite or not of shape (n,), or `size` is negative.
        """
        direction = finite_array("gradient", gradient)
        if direction.shape != (self.n,):
            raise ConfigError(f"gradient has shape {direction.shape}, the policy has {self.n} parameters")
        if not (np.isfinite(size) and size >= 0):
            raise ConfigError(f"step size must be finite and >= 0, got {size}")
        updated = np.empty(self.n)
        with np.errstate(over="ignore"):
            for block in blocks(self.n):
                np.multiply(direction[block], -size, out=updated[block])
                updated[block] += self._values[block]
        self._values = self._project(finite_array("the parameters after the step", updated))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to one safetensors file, atomically.

        Raises:
            CheckpointError: if the file cannot be written.
        """
        target = Path(path)
        header = {
            "class": type(self).__name__,
            "schema": SCHEMA,
            "settings": {name: getattr(self, name) for name in self._settings},
        }
        content = to_safetensors({self._parameter: self._values}, {METADATA_KEY: json.dumps(header)})
        try:
            with atomic_file(target) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise CheckpointError(f"cannot write policy {target}: {error}") from error

    @classmethod
    def load(cls: type[P], path: str | os.PathLike[str]) -> P:
        """Read a policy that `save` of the same class wrote.

        Raises:
            CheckpointError: if the file is missing, corrupt, not written by a policy, of another class or schema,
                or holds values that this class does not admit.
        """
        try:
            with safe_open(os.fspath(path), framework="numpy") as file:
                settings = cls._stored_settings(file.metadata() or {})
                if set(file.keys()) != {cls._parameter}:
                    raise CheckpointError(f"it holds {sorted(file.keys())}, expected {cls._parameter}")
                dtype = file.get_slice(cls._parameter).get_dtype()
                if dtype != "F64":
                    raise CheckpointError(f"{cls._parameter} are {dtype}, expected F64")
                return cls(file.get_tensor(cls._parameter), **settings)
        except (OSError, SafetensorError, ValueError, TypeError, RecursionError, CadsError) as error:
            raise CheckpointError(f"cannot load {cls.__name__} from {path}: {error}") from error

    @classmethod
    def _stored_settings(cls, metadata: dict[str, str]) -> dict[str, Any]:
        """The constructor's settings from the file's metadata, after checking that the file holds this class."""
        header = json.loads(metadata.get(METADATA_KEY, "null"))
        if not isinstance(header, dict):
            raise CheckpointError("it was not written by a cads policy: check the path")
        if header.get("class") != cls.__name__:
            raise CheckpointError(f"it holds a {header.get('class')}: load it with that class")
        if header.get("schema") != SCHEMA:
            raise CheckpointError(f"it has schema {header.get('schema')}, this version reads {SCHEMA}")
        settings = header.get("settings")
        if not isinstance(settings, dict) or set(settings) != set(cls._settings):
            raise CheckpointError(f"its settings are {settings}, expected {', '.join(cls._settings)}")
        return settings

    def _checked(self, draws: NDArray[Any]) -> NDArray[Any]:
        """`draws`, checked to have shape (K, n)."""
        if draws.ndim != 2 or draws.shape[1] != self.n:
            raise ConfigError(f"draws have shape {draws.shape}, expected (K, {self.n})")
        return draws


def _check_count(count: int) -> int:
    """`count`, a number of draws, checked to be >= 0."""
    if count < 0:
        raise ConfigError(f"count must be >= 0, got {count}")
    return count
