"""Synthetic sources with known true labels: label noise, missing or rare classes, transformed images, duplicates."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cads.errors import ConfigError, DataError
from cads.tasks.vision.images import Images, ImageTensors

log = logging.getLogger(__name__)

Transform = Literal["none", "invert", "rotate", "blur"]

ORDER, SOURCE = 1, 2
"""First words of two seeds: of the order in which examples are assigned to sources, and of the draws of a source."""

BLUR = 1 / 14
"""Standard deviation of the Gaussian blur, as a share of the shorter side of the image."""


NAMED = 12
"""Names of classes in a message."""


@dataclass
class SyntheticSource:
    """One synthetic source."""

    name: str
    """What results call it; unique."""
    size: int | None = None
    """Examples in it, copies included; null: an equal share of what the sources with a size leave."""
    label_noise: float = 0.0
    """Probability that a label is replaced by one drawn uniformly from the other classes: 0.9 leaves 10 % of
    the labels correct, which with 10 classes says nothing at all."""
    classes: list[int | str] | None = None
    """Classes it holds, before noise, by name; null: all. Whole numbers are indices, from 0, if no name is a number."""
    transform: Transform = "none"
    """What happens to its images: invert (255 - x), rotate (by 90 degrees), blur (Gaussian)."""
    duplicates: int = 1
    """Each distinct example stands this often in it, with the same label each time."""
    class_weights: list[float] | None = None
    """Relative frequency of each of its classes, in the order of `classes`; null: as the data has them."""

    def __post_init__(self) -> None:
        prefix = f"source {self.name!r}:"
        if not 0 <= self.label_noise <= 1:
            raise ConfigError(f"{prefix} label_noise = {self.label_noise}: it is a probability, 0 to 1")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"{prefix} size = {self.size}: it must be at least 1, or null for an equal share")
        if self.duplicates < 1:
            raise ConfigError(f"{prefix} duplicates = {self.duplicates}: it must be at least 1 (no copies)")
        if self.transform not in TRANSFORMS:
            raise ConfigError(f"{prefix} transform = {self.transform!r}: choose from {list(TRANSFORMS)}")
        if self.classes is not None and not 0 < len(set(self.classes)) == len(self.classes):
            raise ConfigError(f"{prefix} classes = {self.classes}: name at least one, each once")
        if self.class_weights is not None and not (
            all(math.isfinite(w) and w >= 0 for w in self.class_weights) and sum(self.class_weights) > 0
        ):
            raise ConfigError(f"{prefix} class_weights = {self.class_weights}: they must be >= 0, not all 0")

    def numbers(self, names: Sequence[str]) -> list[int]:
        """The index of each of `classes` among the names of all classes: names win over indices.

        Raises:
            ConfigError: if a class is unknown, or named twice.
        """
        index = {name: i for i, name in enumerate(names)}
        # YAML reads a name such as 07 as a number; it means the one name of that number.
        by_number: dict[int, list[int]] = {}
        for i, name in enumerate(names):
            if name.isdecimal():
                by_number.setdefault(int(name), []).append(i)
        numbers, indices, unknown = [], [], []
        for c in self.classes or ():
            if str(c) in index:
                numbers.append(index[str(c)])
            elif isinstance(c, int) and len(by_number.get(c, ())) == 1:
                numbers.append(by_number[c][0])
            elif isinstance(c, int) and not by_number and 0 <= c < len(names):
                numbers.append(c)
                indices.append(c)
            else:
                unknown.append(c)
        if unknown:
            some_names = ", ".join(repr(name) for name in names[:NAMED]) + (", ..." if len(names) > NAMED else "")
            by_index = "" if by_number else f", or an index, 0..{len(names) - 1}"
            raise ConfigError(f"source {self.name!r}: classes {unknown} are unknown: use names, {some_names}{by_index}")
        if len(set(numbers)) < len(numbers):
            raise ConfigError(f"source {self.name!r}: classes {self.classes} name one class twice: name each once")
        if indices:
            meant = [names[i] for i in indices]
            log.warning("source %r: no class is named %s, so they are indices: %s", self.name, indices, meant)
        return numbers

    def weights(self, n_classes: int) -> np.ndarray:
        """Relative frequency of every class, shape (n_classes,); without class_weights 1 for each it holds.

        Its classes are indices; see `in_numbers`.

        Raises:
            ConfigError: if a class is unknown, or the number of weights is not that of the classes.
        """
        classes: list[Any] = list(range(n_classes)) if self.classes is None else [*self.classes]
        unknown = [c for c in classes if not isinstance(c, int) or not 0 <= c < n_classes]
        if unknown:
            raise ConfigError(f"source {self.name!r}: classes {unknown} are unknown: use 0..{n_classes - 1}")
        class_weights = [1.0] * len(classes) if self.class_weights is None else self.class_weights
        if len(class_weights) != len(classes):
            raise ConfigError(f"source {self.name!r}: {len(class_weights)} class_weights for {len(classes)} classes")
        weights = np.zeros(n_classes)
        weights[classes] = class_weights
        return weights


def in_numbers(specs: Sequence[SyntheticSource], names: Sequence[str]) -> list[SyntheticSource]:
    """The sources with the indices of their classes among `names`; indices that were given are said.

    Raises:
        ConfigError: if a class is unknown, or named twice in a source.
    """
    return [spec if spec.classes is None else replace(spec, classes=[*spec.numbers(names)]) for spec in specs]


@dataclass(frozen=True)
class SyntheticPool:
    """The examples of all synthetic sources, source after source, and their true labels.

    Attributes:
        images: payload of N examples, with the labels used in training.
        sources: source code of each example, shape (N,).
        names: the name of each code.
        true_labels: labels before noise, int64, shape (N,).
        corrupted: whether the label was replaced, bool, shape (N,).
        origins: position of each example in the clean images, shape (N,).
        copies: 0 for the first of an example, k for its k-th duplicate, shape (N,).
    """

    images: Images
    sources: np.ndarray
    names: tuple[str, ...]
    true_labels: Tensor
    corrupted: np.ndarray
    origins: np.ndarray
    copies: np.ndarray


def make_synthetic_sources(
    images: Images, specs: Sequence[SyntheticSource], n_classes: int, seed: int
) -> SyntheticPool:
    """Divide clean images into disjoint sources, and apply the noise, transform and duplicates of each spec.

    The examples of all sources are drawn from `seed`, the labels and order of source i from (seed, i). A source holds
    its classes in the proportions of its class_weights, without them in those of the data. Images in memory are
    transformed at once, images in files when they are read.

    Raises:
        ConfigError: if names repeat, a class is unknown, or a spec does not fit these images.
        DataError: if a label is not in 0..n_classes-1, or a source needs more examples than there are.
    """
    names = tuple(spec.name for spec in specs)
    if len(set(names)) < max(1, len(names)):
        raise ConfigError(f"sources {list(names)}: name at least one, each once")
    labels = images.labels.numpy()
    if labels.min() < 0 or labels.max() >= n_classes:
        raise DataError(f"labels {labels.min()}..{labels.max()} with {n_classes} classes: use 0..{n_classes - 1}")
    quotas, sizes = _quotas(specs, np.bincount(labels, minlength=n_classes), n_classes)

    order = np.random.default_rng((ORDER, seed)).permutation(len(images))
    queues = [order[labels[order] == c] for c in range(n_classes)]
    starts = np.concatenate([np.zeros_like(quotas[:1]), quotas.cumsum(axis=0)])
    origins, observed, copies = [], [], []
    for i, spec in enumerate(specs):
        rng = np.random.default_rng((SOURCE, seed, i))
        by_class = [queue[starts[i, c] : starts[i + 1, c]] for c, queue in enumerate(queues)]
        distinct = rng.permutation(np.concatenate(by_class))
        noisy_labels = _redraw(labels[distinct], spec, n_classes, rng)
        copy, index = np.divmod(np.arange(sizes[i]), len(distinct))
        origins.append(distinct[index])
        observed.append(noisy_labels[index])
        copies.append(copy)

    positions = np.concatenate(origins)
    true_labels, observed_labels = images.labels[positions], torch.from_numpy(np.concatenate(observed))
    sources = np.repeat(np.arange(len(specs)), sizes)
    return SyntheticPool(
        images=_transformed(images.take(positions).relabel(observed_labels), specs, sources),
        sources=sources,
        names=names,
        true_labels=true_labels,
        corrupted=(true_labels != observed_labels).numpy(),
        origins=positions,
        copies=np.concatenate(copies),
    )


def source_sizes(specs: Sequence[SyntheticSource], counts: np.ndarray, n_classes: int) -> np.ndarray:
    """Number of examples of each source, shape (S,), from `counts` images of each class, shape (n_classes,).

    Raises:
        ConfigError: if a class is unknown.
        DataError: if a source needs more examples than there are.
    """
    return _quotas(specs, counts, n_classes)[1]


def _redraw(labels: np.ndarray, spec: SyntheticSource, n_classes: int, rng: np.random.Generator) -> np.ndarray:
    """The labels, each replaced with probability `label_noise` by one of the other classes, all equally likely."""
    if spec.label_noise > 0 and n_classes < 2:
        raise ConfigError(f"source {spec.name!r}: label_noise needs at least two classes")
    replaced = rng.random(len(labels)) < spec.label_noise
    shift = rng.integers(1, max(2, n_classes), len(labels))
    return np.where(replaced, (labels + shift) % n_classes, labels)


def _quotas(specs: Sequence[SyntheticSource], counts: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct examples of each class for each source, shape (S, n_classes), and sizes of the sources, shape (S,)."""
    weights = np.array([spec.weights(n_classes) for spec in specs])
    quotas = np.zeros((len(specs), n_classes), dtype=np.int64)
    sizes = np.array([spec.size or 0 for spec in specs])
    available = counts.copy()

    # Sources with the fewest classes come first, so that sources of any class do not use up the examples they need.
    sized = [i for i, spec in enumerate(specs) if spec.size is not None]
    for i in sorted(sized, key=lambda i: ((weights[i] > 0).sum(), specs[i].class_weights is None)):
        distinct = -(-sizes[i] // specs[i].duplicates)
        quotas[i] = _apportion(distinct, _proportions(specs[i], weights[i], available))
        if (quotas[i] > available).any() or quotas[i].sum() < distinct:
            available_by_class = {int(c): int(available[c]) for c in np.flatnonzero(weights[i])}
            raise DataError(
                f"source {specs[i].name!r} needs {distinct} distinct examples, and {sum(available_by_class.values())} "
                f"are there for it (by class: {available_by_class}): make it smaller, or give more data"
            )
        available -= quotas[i]

    shares = np.zeros_like(quotas)
    equal = [i for i, spec in enumerate(specs) if spec.size is None]
    for c in range(n_classes):
        takers = sorted((i for i in equal if weights[i, c] > 0), key=lambda i: (shares[i].sum(), i))
        for rank, i in enumerate(takers):
            shares[i, c] = available[c] // len(takers) + (rank < available[c] % len(takers))
    for i in equal:
        proportions = _proportions(specs[i], weights[i], shares[i])
        sizes[i] = _largest_total(proportions, shares[i])
        if sizes[i] == 0:
            raise DataError(f"nothing is left for source {specs[i].name!r}: make others smaller, or give more data")
        quotas[i] = _apportion(-(-sizes[i] // specs[i].duplicates), proportions)
    return quotas, sizes


def _proportions(spec: SyntheticSource, weights: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Relative frequencies of the classes of a source: its class_weights, or the available examples of its classes."""
    return weights if spec.class_weights is not None else np.where(weights > 0, available, 0)


def _largest_total(proportions: np.ndarray, available: np.ndarray) -> int:
    """Most examples that can be taken in these proportions."""
    in_source = proportions > 0
    if not in_source.any():
        return 0
    return math.floor((available[in_source] * proportions.sum() / proportions[in_source]).min() + 1e-9)


def _apportion(total: int, proportions: np.ndarray) -> np.ndarray:
    """Whole numbers that sum to `total`, by largest remainder; all 0 if every proportion is 0."""
    if proportions.sum() == 0:
        return np.zeros(len(proportions), dtype=np.int64)
    exact = (total * proportions / proportions.sum()).round(9)
    quotas = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(quotas - exact, kind="stable")
    quotas[by_remainder[: total - quotas.sum()]] += 1
    return quotas


class TransformedImages(Images):
    """Images in files that are transformed as they are read.

    Args:
        images: the payload.
        transforms: a name from `TRANSFORMS` for each image, shape (N,).
    """

    def __init__(self, images: Images, transforms: np.ndarray) -> None:
        self._images = images
        self._transforms = transforms
        self.labels, self.shape = images.labels, images.shape

    def pixels(self, positions: np.ndarray) -> Tensor:
        """The images at `positions`, transformed."""
        images, names = self._images.pixels(positions), self._transforms[positions]
        for name in np.unique(names):
            mask = torch.from_numpy(names == name)
            images[mask] = TRANSFORMS[name](images[mask])
        return images

    def take(self, positions: np.ndarray) -> TransformedImages:
        """The images at `positions`; nothing is decoded."""
        index = torch.tensor(positions, dtype=torch.int64)
        taken = TransformedImages(self._images.take(positions), self._transforms[positions])
        taken.labels = self.labels[index]
        return taken


def _transformed(images: Images, specs: Sequence[SyntheticSource], sources: np.ndarray) -> Images:
    names = np.array([spec.transform for spec in specs])
    if (names == "none").all():
        return images
    if (names == "rotate").any() and images.shape[1] != images.shape[2]:
        raise ConfigError(f"transform = 'rotate' needs square images, not {images.shape}: set image_size")
    transformed = TransformedImages(images, names[sources])
    if isinstance(images, ImageTensors):
        return ImageTensors(transformed.pixels(np.arange(len(images))), images.labels)
    return transformed


def keep(images: Tensor) -> Tensor:
    """The images (uint8, shape (B, C, H, W)) as they are."""
    return images


def invert(images: Tensor) -> Tensor:
    """The negative: 255 - x."""
    return 255 - images


def rotate(images: Tensor) -> Tensor:
    """Turned counter-clockwise by 90 degrees."""
    return torch.rot90(images, 1, (-2, -1)).contiguous()


def blur(images: Tensor) -> Tensor:
    """Convolved with a Gaussian of standard deviation `BLUR` times the shorter side, cut at two of them."""
    from torchvision.transforms.functional import gaussian_blur

    side = min(images.shape[-2:])
    radius = min(math.ceil(2 * BLUR * side), side - 1)
    return gaussian_blur(images, [2 * radius + 1] * 2, [BLUR * side] * 2)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": keep,
    "invert": invert,
    "rotate": rotate,
    "blur": blur,
}
"""Transforms of the images of a source, by name."""
