"""A policy over masks whose expected size is given, and may change along a run."""

from __future__ import annotations

from numpy.typing import ArrayLike

from cads.policies.bernoulli import BernoulliPolicy
from cads.policies.simplex import Floats, project_to_sum


class SizedPolicy(BernoulliPolicy):
    """Masks of independent items with an expected size of exactly K: sum(s) = K.

    PBCS (Zhou et al., ICML 2022) asks for sum(s) <= K. The mean loss of what is selected does not change when all
    probabilities shrink together, so that nothing would keep the size from falling below K.

    Args:
        probabilities: s, shape (n,), each in [0, 1]; they are projected. size: K, from 0 to n.
        floor: see `BernoulliPolicy`.

    Raises:
        ConfigError: if an argument is not finite or outside its range.
    """

    _settings = ("floor", "size")

    def __init__(self, probabilities: ArrayLike, size: float, floor: float = 1e-3) -> None:
        super().__init__(probabilities, floor)
        self.resize(size)

    def resize(self, size: float) -> None:
        """Set K, and project the probabilities."""
        self.size = size
        self._values = self._project(self._values.copy())

    @classmethod
    def at(cls, probabilities: Floats, size: float) -> SizedPolicy:
        """The policy at probabilities that are projected already: they are kept to the last bit."""
        policy = cls(probabilities, size)
        policy._values = probabilities
        return policy

    def _project(self, values: Floats) -> Floats:
        return project_to_sum(values, self.size)
