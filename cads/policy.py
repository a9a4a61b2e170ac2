"""Distributions over what to train on: masks of n items (Bernoulli) or mixture ratios of n sources.

A policy p(.; s) is drawn from, scored and moved: the outer problem is min_s E_{m ~ p(.; s)} [ F(m) ], and
`cads.estimator` turns draws, losses and scores into gradients in s.
"""

from __future__ import annotations

import json
import os
import secrets
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors
from scipy.special import entr, erf, ndtr, ndtri

from cads.errors import CadsError, CheckpointError, ConfigError
from cads.simplex import Floats, blocks, check_cap, finite_array, project, project_capped_simplex

Masks = NDArray[np.bool_]
P = TypeVar("P", bound="Policy")

SCHEMA = 1
"""Version of the file that `Policy.save` writes."""

METADATA_KEY = "cads.policy"
"""Where the JSON header stands in the metadata of the safetensors file."""

CAP_TOLERANCE = 1e-6
"""How far a sum of probabilities may exceed its cap by rounding, relative to max(1, cap)."""

SIGMA_RANGE = (1e-6, 1e6)
"""Below, a draw is its mean in float32; above, a draw is uniform. (1 / sigma)^2 stays far from overflow."""


class Policy(ABC):
    """A distribution over draws of shape (n,), with one parameter an item, all in [0, 1].

    Items are what is selected: examples or sources. `step` changes the parameters in place; everything else
    leaves the policy as it is. Randomness comes from the generator given to `sample` alone.
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
        moved = np.empty(self.n)
        with np.errstate(over="ignore"):
            for part in blocks(self.n):
                np.multiply(direction[part], -size, out=moved[part])
                moved[part] += self._values[part]
        self._values = self._project(finite_array("the parameters after the step", moved))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to one safetensors file, whole or not at all.

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
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        try:
            with open(partial, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write policy {target}: {error}") from error

    @classmethod
    def load(cls: type[P], path: str | os.PathLike[str]) -> P:
        """Read a policy that `save` of the same class wrote.

        Raises:
            CheckpointError: if the file is missing, foreign, corrupt, of another class or schema, or holds
                values that this class does not admit.
        """
        try:
            with safe_open(os.fspath(path), framework="numpy") as stored:
                settings = cls._stored_settings(stored.metadata() or {})
                if set(stored.keys()) != {cls._parameter}:
                    raise CheckpointError(f"it holds {sorted(stored.keys())}, expected {cls._parameter}")
                dtype = stored.get_slice(cls._parameter).get_dtype()
                if dtype != "F64":
                    raise CheckpointError(f"{cls._parameter} are {dtype}, expected F64")
                return cls(stored.get_tensor(cls._parameter), **settings)
        except (OSError, SafetensorError, ValueError, TypeError, RecursionError, CadsError) as error:
            raise CheckpointError(f"cannot load {cls.__name__} from {path}: {error}") from error

    @classmethod
    def _stored_settings(cls, metadata: dict[str, str]) -> dict[str, Any]:
        """Return the constructor's settings, once the file is known to hold this class."""
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
        if draws.ndim != 2 or draws.shape[1] != self.n:
            raise ConfigError(f"draws have shape {draws.shape}, expected (K, {self.n})")
        return draws


class BernoulliPolicy(Policy):
    """Masks m in {0, 1}^n of independent items, P(m_i = 1) = s_i (CADS-E and CADS-S, arXiv 2510.16806).

    Args:
        probabilities: s, shape (n,), each in [0, 1].
        floor: the score's denominators use s clipped into [floor, 1 - floor], see `score`.
        cap: the largest expected number of selected items, sum(s) <= cap; None for no cap.

    Raises:
        ConfigError: if an argument is not finite or outside its range, or the probabilities exceed the cap.
    """

    _parameter = "probabilities"
    _settings = ("floor", "cap")

    def __init__(self, probabilities: ArrayLike, floor: float = 1e-3, cap: float | None = None) -> None:
        super().__init__(probabilities)
        if not 0 < floor < 0.5:
            raise ConfigError(f"floor must be in (0, 0.5), got {floor}")
        if cap is not None:
            check_cap(cap)
            if self._values.sum() > cap + CAP_TOLERANCE * max(1.0, cap):
                raise ConfigError(
                    f"probabilities sum to {self._values.sum()}, above cap {cap}: "
                    "pass project_capped_simplex(probabilities, cap)"
                )
        self.floor = floor
        self.cap = cap

    @property
    def probabilities(self) -> Floats:
        """A copy of s, shape (n,)."""
        return self._values.copy()

    def sample(self, count: int, rng: np.random.Generator) -> Masks:
        """Draw masks, bool (count, n).

        The uniforms are float32: probabilities are honoured to 2^-24, exactly at 0 and 1.
        """
        masks = np.empty((_check_count(count), self.n), dtype=np.bool_)
        for row in masks:
            # A generator's stream does not depend on how it is cut.
            for part in blocks(self.n):
                np.less(rng.random(part.stop - part.start, dtype=np.float32), self._values[part], out=row[part])
        return masks

    def log_prob(self, draws: Masks) -> Floats:
        """log p(m; s) = sum_i m_i log s_i + (1 - m_i) log(1 - s_i), masks (K, n) -> (K,) nats."""
        total = np.zeros(len(self._checked(draws)))
        for part in blocks(self.n):
            s = self._values[part]
            with np.errstate(divide="ignore"):
                selected, rejected = np.log(s), np.log1p(-s)
            for k, row in enumerate(draws[:, part]):
                total[k] += np.where(row, selected, rejected).sum()
        return total

    def score(self, draws: Masks) -> Floats:
        """Score d log p / d s_i = (m_i - s_i) / (c_i (1 - c_i)), c = clip(s, floor, 1 - floor), masks (K, n).

        It is the gradient of `log_prob` wherever s lies in [floor, 1 - floor]. Outside it is the gradient
        times s(1 - s) / (c(1 - c)) <= 1: still of mean zero, bounded by 1 / (floor (1 - floor)), and zero at
        s = 0 and s = 1 for the only mask that can be drawn there, so such an item stays where it is until
        another gradient or the projection moves it.
        """
        score = np.empty(self._checked(draws).shape)
        for part in blocks(self.n):
            s = self._values[part]
            clipped = np.clip(s, self.floor, 1 - self.floor)
            variance = clipped * (1 - clipped)
            np.subtract(draws[:, part], s, out=score[:, part])
            score[:, part] /= variance
        return score

    def entropy(self) -> float:
        """Entropy -sum_i [ s_i log s_i + (1 - s_i) log(1 - s_i) ], in nats."""
        parts = (self._values[part] for part in blocks(self.n))
        return sum(float((entr(s) + entr(1 - s)).sum()) for s in parts)

    def _project(self, values: Floats) -> Floats:
        return project(values, self.n if self.cap is None else self.cap)

    def _checked(self, draws: NDArray[Any]) -> NDArray[Any]:
        if draws.dtype != np.bool_:
            raise ConfigError(f"masks must be bool, got {draws.dtype}: pass draws.astype(bool)")
        return super()._checked(draws)


class MixturePolicy(Policy):
    """Ratios r in [0, 1]^n of n sources, r_j independent Gaussians (mu_j, sigma) truncated to [0, 1].

    A draw divided by its sum is the mixture (`ratios`). Density, score and entropy are those of the draw
    before that division. With a_j = -mu_j / sigma, b_j = (1 - mu_j) / sigma and Z_j = Phi(b_j) - Phi(a_j):
    p(r_j) = phi((r_j - mu_j) / sigma) / (sigma Z_j).

    Args:
        means: mu, shape (n,), each in [0, 1], not all 0; `step` keeps them on the probability simplex.
        sigma: the common standard deviation before truncation, within `SIGMA_RANGE`.

    Raises:
        ConfigError: if an argument is not finite or outside its range.
    """

    _parameter = "means"
    _settings = ("sigma",)

    def __init__(self, means: ArrayLike, sigma: float) -> None:
        super().__init__(means)
        if self._values.sum() == 0:
            raise ConfigError("means are all 0: at least one source needs a positive mean")
        if not SIGMA_RANGE[0] <= sigma <= SIGMA_RANGE[1]:
            raise ConfigError(f"sigma must be in [{SIGMA_RANGE[0]}, {SIGMA_RANGE[1]}], got {sigma}")
        self.sigma = sigma

    @property
    def means(self) -> Floats:
        """A copy of mu, shape (n,)."""
        return self._values.copy()

    def sample(self, count: int, rng: np.random.Generator) -> Floats:
        """Draw r = mu + sigma Phi^-1( Phi(a) + u Z ), u uniform on (0, 1): float64 (count, n)."""
        a, b, mass = self._truncation()
        # A uniform of exactly 0 would have an infinite quantile.
        uniforms = np.maximum(rng.random((_check_count(count), self.n)), 2.0**-54)
        # Each quantile from its nearer tail: a probability near 1 has lost the digits it needs.
        lower = ndtr(a) + uniforms * mass
        upper = ndtr(-b) + (1 - uniforms) * mass
        quantiles = np.where(lower <= upper, ndtri(lower), -ndtri(upper))
        return np.clip(self._values + self.sigma * quantiles, 0.0, 1.0)

    def ratios(self, draws: NDArray[Any]) -> Floats:
        """Divide each draw by its sum, (K, n) -> (K, n): rows are mixtures.

        Raises:
            ConfigError: if a draw is negative, not finite or sums to 0.
        """
        total = self._checked(draws).sum(axis=1, keepdims=True)
        if not (np.isfinite(total).all() and (draws >= 0).all() and (total > 0).all()):
            raise ConfigError("a draw of ratios must be finite, non-negative and not all 0")
        return draws / total

    def log_prob(self, draws: NDArray[Any]) -> Floats:
        """log p(r; mu) = -sum_j [ (r_j - mu_j)^2 / (2 sigma^2) + log(sigma sqrt(2 pi) Z_j) ], in nats."""
        _, _, mass = self._truncation()
        inside = ((self._checked(draws) >= 0) & (draws <= 1)).all(axis=1)
        squares = (((draws - self._values) / self.sigma) ** 2).sum(axis=1)
        normaliser = np.log(self.sigma * np.sqrt(2 * np.pi) * mass).sum()
        return np.where(inside, -squares / 2 - normaliser, -np.inf)

    def score(self, draws: NDArray[Any]) -> Floats:
        """d log p / d mu_j = (r_j - mu_j) / sigma^2 - (phi(a_j) - phi(b_j)) / (sigma Z_j), (K, n)."""
        a, b, mass = self._truncation()
        # expm1 keeps phi(a) - phi(b) accurate for large sigma, where both densities approach phi(0).
        fall = (np.expm1(-(a**2) / 2) - np.expm1(-(b**2) / 2)) / np.sqrt(2 * np.pi)
        return (self._checked(draws) - self._values) / self.sigma**2 - fall / (self.sigma * mass)

    def entropy(self) -> float:
        """Entropy sum_j [ log(sqrt(2 pi e) sigma Z_j) + (a_j phi(a_j) - b_j phi(b_j)) / (2 Z_j) ] in nats."""
        a, b, mass = self._truncation()
        edge = (a * np.exp(-(a**2) / 2) - b * np.exp(-(b**2) / 2)) / np.sqrt(2 * np.pi)
        return float((np.log(np.sqrt(2 * np.pi * np.e) * self.sigma * mass) + edge / (2 * mass)).sum())

    def _project(self, values: Floats) -> Floats:
        # The simplex fixes the sum, so adding a constant changes nothing; with the largest entry at 1 the
        # constraint sum <= 1 binds, and {0 <= x <= 1, sum x <= 1} gives the simplex' own projection.
        return project_capped_simplex(values - values.max() + 1.0, 1.0)

    def _truncation(self) -> tuple[Floats, Floats, Floats]:
        """Return a, b and Z, each (n,); as a <= 0 <= b, Z is a sum of two terms >= 0: no cancellation."""
        a = -self._values / self.sigma
        b = (1 - self._values) / self.sigma
        return a, b, (erf(b / np.sqrt(2)) + erf(-a / np.sqrt(2))) / 2


def _check_count(count: int) -> int:
    if count < 0:
        raise ConfigError(f"count must be >= 0, got {count}")
    return count
