"""Projection of gradients to few dimensions that preserves inner products: a seeded sparse sketch, in plain PyTorch.

The sketch is a CountSketch (Charikar et al. 2002; the sparse Johnson-Lindenstrauss transform with one nonzero per
entry, Kane and Nelson 2014): each entry of the gradient gets a random sign and is added to one of d buckets. For fixed
x and y the sketched inner product is unbiased, with variance at most `(|x|^2 |y|^2 + <x, y>^2) / d` over the draw of
buckets and signs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cads.accounting.operations import sketch_flops
from cads.errors import CadsError, ConfigError
from cads.seeding import derive

PROJECTED = 8192
"""Dimension of LESS (arXiv 2402.04333, appendix A)."""
CHECK_DEVIATIONS = 8.0
"""Standard deviations by which norms and inner products may be off in the self-test."""

Dimension = int | Literal["auto"] | None


class ProjectionError(CadsError):
    """A projection that does not preserve norms and inner products."""


class Projection(ABC):
    """A linear map of gradients, given parameter by parameter, to vectors of `dimension` entries.

    Args:
        sizes: the number of entries of each parameter, by name, in order.
        dimension: number of entries of the vectors.
        seed: determines the map.
        device: device of the gradients.

    Raises:
        ConfigError: if there is no parameter.
    """

    def __init__(self, sizes: Mapping[str, int], dimension: int, seed: int, device: torch.device | str) -> None:
        if not sizes or min(sizes.values()) < 1:
            raise ConfigError(f"a projection needs parameters with entries: it was given {dict(sizes)}")
        self.sizes = dict(sizes)
        self.dimension, self.seed, self.device = dimension, seed, torch.device(device)

    @property
    def size(self) -> int:
        """Entries of the whole gradient."""
        return sum(self.sizes.values())

    def empty(self, n: int) -> Tensor:
        """Accumulators for the vectors of n gradients: zeros, shape (n, dimension), in double precision."""
        return torch.zeros(n, self.dimension, dtype=torch.float64, device=self.device)

    @abstractmethod
    def add(self, name: str, gradient: Tensor, into: Tensor) -> None:
        """Add the projection of the gradients of one parameter.

        Args:
            gradient: of n examples, shape (n, size of the parameter).
            into: shape (n, dimension), changed in place.
        """

    @abstractmethod
    def flops(self, n: float) -> float:
        """FLOPs of the projection of n gradients."""

    def check(self) -> None:
        """Project two random gradients, and compare their norms and their inner product with the true ones.

        Raises:
            ProjectionError: if a result is zero, NaN, or off by more than chance explains.
        """
        exact = torch.zeros(2, 2, dtype=torch.float64)
        projected = self.empty(2)
        for name, gradients in self._probes():
            exact += (gradients.double() @ gradients.double().T).cpu()
            self.add(name, gradients, projected)
        gram = (projected @ projected.T).cpu()
        if not torch.isfinite(gram).all() or not (gram.diagonal() > 0).all():
            raise ProjectionError(
                f"the projection to {self.dimension} dimensions turns random gradients into vectors of squared norms "
                f"{gram.diagonal().tolist()}: this is an error of this machine's arithmetic or memory; nothing can be "
                "ranked with it"
            )
        scale = exact.diagonal().sqrt()
        error = float(((gram - exact) / torch.outer(scale, scale)).abs().max())
        if error > self._tolerance():
            raise ProjectionError(
                f"the projection to {self.dimension} dimensions changes inner products of random gradients by "
                f"{error:.3g} of their norms, where chance allows {self._tolerance():.3g}"
            )

    @abstractmethod
    def _tolerance(self) -> float:
        """Largest error of an inner product of unit vectors in the self-test."""

    def _probes(self) -> Iterator[tuple[str, Tensor]]:
        for name, size in self.sizes.items():
            gradients = torch.randn(2, size, generator=_generator(self.seed, name, "check"))
            gradients[1] += gradients[0]  # so that their inner product is far from zero
            yield name, gradients.to(self.device)


@dataclass(frozen=True)
class _Buckets:
    """The buckets of one parameter's entries: k full rounds over all d buckets, and r < d remaining entries.

    Attributes:
        order: entries of the full rounds, round by round, shape (k d,). order_signs: their signs.
        rest: the remaining entries, shape (r,). rest_signs: their signs. rest_buckets: their buckets, all different.
    """

    order: Tensor
    order_signs: Tensor
    rest: Tensor
    rest_signs: Tensor
    rest_buckets: Tensor


class Sketch(Projection):
    """A CountSketch whose buckets are equally full.

    The entries of one parameter are assigned to the buckets in rounds, so that two entries collide a little less often
    than with a hash. Parameters are assigned independently, each by (seed, name). Draws are made on the CPU, so the map
    is the same on all devices. No scatter writes to one bucket twice, so sums have a fixed order.

    Raises:
        ConfigError: if `dimension` is not positive, or above the number of entries.
    """

    def __init__(self, sizes: Mapping[str, int], dimension: int, seed: int, device: torch.device | str = "cpu") -> None:
        super().__init__(sizes, dimension, seed, device)
        check_dimension(dimension, self.size)
        self._buckets: dict[str, _Buckets] = {}

    def add(self, name: str, gradient: Tensor, into: Tensor) -> None:
        """Sign each entry and add it to its bucket; see `Projection.add`."""
        if name not in self._buckets:
            self._buckets[name] = self._assign(name)
        p, d = self._buckets[name], self.dimension
        if len(p.order):
            signed = gradient.index_select(1, p.order).mul_(p.order_signs)
            into += signed.view(len(gradient), -1, d).sum(dim=1)
        if len(p.rest):
            signed = gradient.index_select(1, p.rest).mul_(p.rest_signs)
            into.index_add_(1, p.rest_buckets, signed.to(into.dtype))

    def flops(self, n: float) -> float:
        """One signed addition per entry."""
        return sketch_flops(n, self.size)

    def _assign(self, name: str) -> _Buckets:
        generator, d, n = _generator(self.seed, name, "places"), self.dimension, self.sizes[name]
        n_full = n // d * d
        order = torch.randperm(n, generator=generator)
        signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8) * 2 - 1
        rest_buckets = torch.randperm(d, generator=generator)[: n - n_full]
        order = order.int()
        parts = (order[:n_full], signs[:n_full], order[n_full:], signs[n_full:], rest_buckets)
        return _Buckets(*(part.to(self.device) for part in parts))

    def _tolerance(self) -> float:
        # The two probes scaled to unit norm have |<x, y>| <= 1, so the variance is at most 2 / d.
        return CHECK_DEVIATIONS * math.sqrt(2 / self.dimension)


class Whole(Projection):
    """No projection: the gradients of all parameters concatenated, in the order of `sizes`."""

    def __init__(self, sizes: Mapping[str, int], device: torch.device | str = "cpu") -> None:
        super().__init__(sizes, sum(sizes.values()), 0, device)
        ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
        self._slices = {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}

    def add(self, name: str, gradient: Tensor, into: Tensor) -> None:
        """Add the gradient at the parameter's slice; see `Projection.add`."""
        into[:, self._slices[name]] += gradient

    def flops(self, n: float) -> float:
        """Nothing is computed."""
        return 0.0

    def _tolerance(self) -> float:
        return 1e-5


def make_projection(
    sizes: Mapping[str, int], dimension: Dimension, seed: int, device: torch.device | str = "cpu"
) -> Projection:
    """A projection of gradients with these parameters.

    Args:
        sizes: the number of entries of each parameter, by name.
        dimension: d; None for no projection; "auto" for `PROJECTED`, or for no projection if gradients have no more
            entries than that.

    Raises:
        ConfigError: if the dimension is not positive, or above the number of entries.
    """
    size = sum(sizes.values())
    if dimension is None or (dimension == "auto" and size <= PROJECTED):
        return Whole(sizes, device)
    return Sketch(sizes, PROJECTED if dimension == "auto" else dimension, seed, device)


def check_dimension(dimension: int, size: int) -> None:
    """Refuse a dimension that a projection cannot have.

    Raises:
        ConfigError: if it is not positive, or above `size`.
    """
    if dimension < 1:
        raise ConfigError(f"dimension = {dimension}: it must be at least 1, 'auto', or null for no projection")
    if dimension > size:
        raise ConfigError(
            f"dimension = {dimension} is above the {size:,} entries of the gradient: choose at most that many, 'auto', "
            "or null for no projection"
        )


def _generator(seed: int, name: str, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, purpose, name))
