"""A policy over examples that is a function of their features: s(x) = sigmoid(w . phi(x) + b).

It has as many parameters as there are features, whatever the number of examples. So it can be learned on a sample and
applied to examples that were never seen.

Notation: n examples, P features, phi the standardised features, v = (w, b) the parameters, R and l* as in
`cads.estimators.score_function`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from cads.errors import CheckpointError, ConfigError
from cads.estimators.rao_blackwell import rao_blackwell_leading
from cads.estimators.score_function import corrected
from cads.policies.simplex import Floats, finite_array
from cads.runtime.atomic_files import whole_file
from cads.runtime.checkpoint import load_json

SCHEMA = 1
"""Version of what `AmortisedPolicy.to_json` writes."""
LEAST_SCALE = 1e-9
"""Deviation below which a feature does not vary."""


@dataclass(frozen=True)
class AmortisedPolicy:
    """Masks of independent examples with P(m_i = 1) = s(x_i) = sigmoid(w . (x_i - centre) / scale + b).

    Attributes:
        names: of the features.
        centre, scale: standardise the features, shape (P,).
        weights: w, shape (P,). bias: b.

    Raises:
        ConfigError: if shapes disagree, a number is not finite, or a scale is not positive.
    """

    names: tuple[str, ...]
    centre: Floats
    scale: Floats
    weights: Floats
    bias: float

    def __post_init__(self) -> None:
        for name in ("centre", "scale", "weights"):
            values = finite_array(name, getattr(self, name))
            if values.shape != (len(self.names),):
                raise ConfigError(f"{name} has {len(values)} entries for the {len(self.names)} features {self.names}")
            object.__setattr__(self, name, values)
        if self.scale.min() <= 0:
            raise ConfigError(f"scale must be > 0, got {self.scale.min()}: leave out features that do not vary")
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"features {self.names}: each needs its own name")
        if not np.isfinite(self.bias):
            raise ConfigError(f"bias must be finite, got {self.bias}")

    @property
    def parameters(self) -> Floats:
        """v = (w, b), shape (P + 1,)."""
        return np.append(self.weights, self.bias)

    def at(self, parameters: Floats) -> AmortisedPolicy:
        """The policy with the same features and other parameters v."""
        return AmortisedPolicy(self.names, self.centre, self.scale, parameters[:-1], float(parameters[-1]))

    def standardised(self, features: np.ndarray) -> Floats:
        """phi of features (n, P), shape (n, P).

        Raises:
            ConfigError: if there is another number of columns.
        """
        if features.ndim != 2 or features.shape[1] != len(self.names):
            raise ConfigError(f"features have shape {features.shape}, expected one column for each of {self.names}")
        return np.asarray((features - self.centre) / self.scale)

    def probabilities(self, features: np.ndarray) -> Floats:
        """s of features (n, P), seen before or not, shape (n,)."""
        return np.asarray(expit(self.standardised(features) @ self.weights + self.bias))

    def chain(self, features: np.ndarray, gradient: np.ndarray) -> Floats:
        """The gradient in v, shape (P + 1,), from that in s, shape (n,): sum_i g_i s_i (1 - s_i) (phi_i, 1)."""
        s = self.probabilities(features)
        inner = gradient * s * (1 - s)
        return np.append(inner @ self.standardised(features), inner.sum())

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON values; `from_json` restores it to all digits."""
        arrays = {name: getattr(self, name).tolist() for name in ("centre", "scale", "weights")}
        return {"schema_version": SCHEMA, "names": list(self.names), **arrays, "bias": self.bias}

    @classmethod
    def from_json(cls, record: Any) -> AmortisedPolicy:
        """The policy that `to_json` described.

        Raises:
            CheckpointError: if it is no such description.
        """
        try:
            version = record["schema_version"] if isinstance(record, Mapping) else None
            if version != SCHEMA:
                raise CheckpointError(f"schema version {version!r}, this version reads {SCHEMA}")
            centre, scale, weights = (np.array(record[n], dtype=np.float64) for n in ("centre", "scale", "weights"))
            if not all(isinstance(name, str) for name in record["names"]):
                raise CheckpointError("its features have names that are no text")
            return cls(tuple(record["names"]), centre, scale, weights, float(record["bias"]))
        except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
            raise CheckpointError(f"this describes no policy over features: {error}") from error

    def save(self, path: Path | str) -> None:
        """Write the policy to one JSON file, whole or not at all."""
        whole_file(Path(path), json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> AmortisedPolicy:
        """Read the file that `save` wrote. No code in it is executed.

        Raises:
            CheckpointError: if it is missing, a link, too large, or no policy.
        """
        try:
            return cls.from_json(load_json(Path(path)))
        except (OSError, ValueError, RecursionError, CheckpointError) as error:
            raise CheckpointError(f"no policy can be read from {path}: {error}") from error


def penalty_direction(features: np.ndarray, signal: np.ndarray) -> tuple[Floats, Floats, Floats]:
    """The gradient of the penalty in w, up to its length, at the uniform policy.

    There the Rao-Blackwellised gradient in s_i (`rao_blackwell_leading`) is proportional to `signal_i` minus its
    mean. In w it is proportional to the covariance of features and signal, so that each feature counts by its own
    covariance with the signal. The natural gradient is a regression of the signal on all features. If the signal is
    among the features, it returns the signal itself and ignores the others: it selected more wrongly labelled images
    (`experiments/results/amortised.md`).

    Args:
        features: (n, P). signal: l(theta) - (c2/c1) l(u), nats, shape (n,).

    Returns:
        centre and scale of the features, and the gradient for the standardised ones; shape (P,) each.
    """
    centre, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > LEAST_SCALE, scale, 1.0)
    return centre, scale, (signal - signal.mean()) @ ((features - centre) / scale) / len(features)


def mean_loss(policy: AmortisedPolicy, features: np.ndarray, losses: np.ndarray) -> float:
    """R of the policy, nats: the mean of losses (shape (n,)) weighted by s, `E[R]` up to O(1 / sum(s))."""
    return float(np.average(losses, weights=policy.probabilities(features)))


def mean_loss_slope(policy: AmortisedPolicy, features: np.ndarray, losses: np.ndarray) -> Floats:
    """The gradient of `mean_loss` in v, shape (P + 1,)."""
    return policy.chain(features, rao_blackwell_leading(losses, policy.probabilities(features)))


def mirrored(centre: Floats, sigma: Floats, pairs: int, rng: np.random.Generator) -> Floats:
    """Draws of v ~ N(centre, sigma^2), each followed by its mirror image; shape (2 pairs, P + 1).

    A parameter with sigma = 0 keeps the value of the centre.
    """
    offsets = sigma * rng.standard_normal((pairs, len(centre)))
    return np.stack([centre + offsets, centre - offsets], axis=1).reshape(-1, len(centre))


def corrected_slope(
    centre: Floats,
    sigma: Floats,
    draws: Floats,
    values: np.ndarray,
    control: np.ndarray,
    control_slope: Floats,
) -> Floats:
    """Estimate of the gradient of E_v[F(v)], v ~ N(centre, sigma^2), with respect to the centre; shape (P + 1,).

    The score function of the Gaussian is `(v - centre) / sigma^2` (parameter-exploring policy gradients, Sehnke et
    al. 2010): a mask of single examples tells next to nothing about w, while a draw of w moves all of them. With
    h = c1 R - c2 l* as control variate it is `cads.estimators.score_function.corrected`: unbiased, as draws come from
    this Gaussian and h is fitted to others. In mirrored draws any constant cancels.

    Args:
        draws: shape (K, P + 1), from `mirrored`. values: F of each, shape (K,). control: h of each, shape (K,).
        control_slope: the gradient of E_v[h(v)], shape (P + 1,).
    """
    varies = sigma > 0
    scores = np.zeros_like(draws)
    scores[:, varies] = (draws[:, varies] - centre[varies]) / sigma[varies] ** 2
    return np.where(varies, corrected(values, control, control_slope, scores, baseline="none"), 0.0)
