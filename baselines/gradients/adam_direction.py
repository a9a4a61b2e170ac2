"""The direction in which a single example would move the parameters: its gradient after Adam's scaling (LESS)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

from cads.accounting.operations import adam_direction_flops
from cads.errors import CheckpointError, ConfigError

BETAS = 0.9, 0.999
"""(b1, b2) of Adam, equal to the trainer's."""
EPSILON = 1e-8

Recipe = Literal["corrected", "paper", "sgd"]


class AdamDirection:
    """`Gamma(g)`, the direction of Adam's next step if the batch were a single example with gradient g.

    With m and v the moments after t steps, `m' = b1 m + (1 - b1) g` and `v' = b2 v + (1 - b2) g^2`:
    - paper: `m' / sqrt(v' + eps)`, without bias correction (LESS's released code, arXiv 2402.04333);
    - corrected: `m_hat / (sqrt(v_hat) + eps)`, `m_hat = m' / (1 - b1^(t+1))`, `v_hat = v' / (1 - b2^(t+1))`, which is
      the step that Adam takes;
    - sgd: g itself.

    Args:
        recipe: paper, corrected or sgd.
        first, second: m and v of each parameter, by name.
        steps: t, the number of steps so far.

    Raises:
        ConfigError: if the recipe is unknown.
        CheckpointError: if `first` and `second` have different parameters.
    """

    def __init__(self, recipe: Recipe, first: Mapping[str, Tensor], second: Mapping[str, Tensor], steps: int) -> None:
        if recipe not in get_args(Recipe):
            raise ConfigError(f"recipe = {recipe!r}: choose from {list(get_args(Recipe))}")
        if first.keys() != second.keys():
            unpaired = sorted(first.keys() ^ second.keys())
            raise CheckpointError(
                f"Adam's moments are not of the same parameters: {unpaired[:3]} have only one of them"
            )
        self.recipe: Recipe = recipe
        self._first = {name: moment.flatten() for name, moment in first.items()}
        self._second = {name: moment.flatten() for name, moment in second.items()}
        self._correction = (1.0, 1.0)
        if recipe == "corrected":
            b1, b2 = BETAS
            self._correction = 1 - b1 ** (steps + 1), 1 - b2 ** (steps + 1)

    def __call__(self, name: str, gradient: Tensor) -> Tensor:
        """The direction of one parameter for b examples, shape (b, entries), from their gradients.

        Raises:
            CheckpointError: if the moments of this parameter are missing or have another size.
        """
        if self.recipe == "sgd":
            return gradient
        m, v = self._first.get(name), self._second.get(name)
        if m is None or v is None or m.numel() != gradient.shape[1]:
            raise CheckpointError(
                f"the checkpoint has no moments of Adam for {name!r}: train it with adamw, or rank with recipe = 'sgd'"
            )
        b1, b2 = BETAS
        c1, c2 = self._correction
        second = gradient.square().mul_((1 - b2) / c2).add_(v, alpha=b2 / c2)
        first = gradient.mul_((1 - b1) / c1).add_(m, alpha=b1 / c1)
        if self.recipe == "paper":
            return first.div_(second.add_(EPSILON).sqrt_())
        return first.div_(second.sqrt_().add_(EPSILON))

    def flops(self, n: float, size: int) -> float:
        """FLOPs of the directions of n examples."""
        return 0.0 if self.recipe == "sgd" else adam_direction_flops(n, size)
