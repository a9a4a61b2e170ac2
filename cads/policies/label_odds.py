"""A Bernoulli probability for each example: that its label is right, by the likelihood under the model in training.

Of source s a share rho_s of labels is wrong, and a wrong label has the loss l0 (nats), that of a guess. The posterior
that the label of example i is right,

    w_i = (1 - rho_s) exp(-l_i) / ((1 - rho_s) exp(-l_i) + rho_s exp(-l0)) = sigmoid(logit(1 - rho_s) + l0 - l_i),

is one mirror-descent step, from the prior 1 - rho_s and of length 1, along the gradient `l_i(theta) - l*_i` of the
penalty in w_i, with the loss of a guess for l*_i:

    w_i = argmin_w  w (l_i - l0) + KL(Bernoulli(w) || Bernoulli(1 - rho_s)).

rho_s is the running mean of 1 - w_i over the draws of its source: expectation maximisation, one batch at a time.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit, logit

START = 0.3
"""rho of every source before its first example is weighed."""
RANGE = (0.001, 0.999)
"""Bounds of rho, so that no source is given up for good."""


class LabelOdds:
    """The share of wrong labels of each source, learned from the losses of training steps.

    Args:
        n_sources: S. guess_loss: l0, nats.
        memory: rows of all sources over which the running means reach back.

    Attributes:
        wrong: rho, shape (S,).
    """

    def __init__(self, n_sources: int, guess_loss: float, memory: float) -> None:
        self.wrong = np.full(n_sources, START)
        self._guess_loss, self._memory = guess_loss, memory / n_sources

    def log_odds(self, sources: np.ndarray) -> np.ndarray:
        """logit(1 - rho_s) + l0 of examples of `sources` (int, shape (n,)): w_i is the sigmoid of this less l_i."""
        return np.asarray(logit(1 - self.wrong) + self._guess_loss)[sources]

    def weights(self, sources: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """w of examples with `losses`, nats, shape (n,)."""
        return np.asarray(expit(self.log_odds(sources) - losses))

    def update(self, sources: np.ndarray, weights: np.ndarray) -> None:
        """Move rho of each source towards the mean of 1 - w of its rows, by exp(-rows / memory)."""
        rows = np.bincount(sources, minlength=len(self.wrong))
        means = np.bincount(sources, weights=1 - weights, minlength=len(self.wrong)) / np.maximum(rows, 1)
        decay = np.exp(-rows / self._memory)
        self.wrong = np.clip(decay * self.wrong + (1 - decay) * means, *RANGE)
