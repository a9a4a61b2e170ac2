"""Sources with known truth: label noise, missing or rare classes, shifted images, copies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cads.errors import ConfigError, DataError
from cads.tasks.vision.images import Images, ImageTensors

Transform = Literal["none", "invert", "rotate", "blur"]

ORDER, SOURCE = 1, 2
"""First words of the seeds of the order in which examples are given away, and of what a source draws."""

BLUR = 1 / 14
"""Standard deviation of the Gaussian blur, as a share of the shorter side of the image."""


@dataclass
class SyntheticSource:
    """One made source."""

    name: str
    """What results call it; unique."""
    size: int | None = None
    """Examples in it, copies included; null: an equal share of what the sources with a size leave."""
    label_noise: float = 0.0
    """Probability that a label is replaced by one drawn uniformly from the other classes: 0.9 leaves 10 % of
    the labels correct, which with 10 classes says nothing at all."""
    classes: list[int] | None = None
    """Labels it holds, before noise; null: all."""
    transform: Transform = "none"
    """What happens to its images: invert (255 - x), rotate (by 90 degrees), blur (Gaussian)."""
    duplicates: int = 1
    """Each distinct example stands this often in it, with the same label each time."""
    class_weights: list[float] | None = None
    """Relative frequency of each of its classes, in the order of `classes`; null: as the data has them."""

    def __post_init__(self) -> None:
        where = f"source {self.name!r}:"
        if not 0 <= self.label_noise <= 1:
            raise ConfigError(f"{where} label_noise = {self.label_noise}: it is a probability, 0 to 1")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"{where} size = {self.size}: it must be at least 1, or null for an equal share")
        if self.duplicates < 1:
            raise ConfigError(f"{where} duplicates = {self.duplicates}: it must be at least 1 (no copies)")
        if self.transform not in TRANSFORMS:
            raise ConfigError(f"{where} transform = {self.transform!r}: choose from {list(TRANSFORMS)}")
        if self.classes is not None and not 0 < len(set(self.classes)) == len(self.classes):
            raise ConfigError(f"{where} classes = {self.classes}: name at least one, each once")
        if self.class_weights is not None and not (
            all(math.isfinite(w) and w >= 0 for w in self.class_weights) and sum(self.class_weights) > 0
        ):
            raise ConfigError(f"{where} class_weights = {self.class_weights}: they must be >= 0, not all 0")

    def weights(self, n_classes: int) -> np.ndarray:
        """Relative frequency of every class, shape (n_classes,); without class_weights 1 for each it holds.

        Raises:
            ConfigError: if a class is unknown, or the number of weights is not that of the classes.
        """
        classes = list(range(n_classes)) if self.classes is None else self.classes
        unknown = [c for c in classes if not 0 <= c < n_classes]
        if unknown:
            raise ConfigError(f"source {self.name!r}: classes {unknown} are unknown: use 0..{n_classes - 1}")
        given = [1.0] * len(classes) if self.class_weights is None else self.class_weights
        if len(given) != len(classes):
            raise ConfigError(f"source {self.name!r}: {len(given)} class_weights for {len(classes)} classes")
        weights = np.zeros(n_classes)
        weights[classes] = given
        return weights


@dataclass(frozen=True)
class SyntheticPool:
    """What was made, source after source, and the truth about it.

    Attributes:
        images: payload of N examples, with the labels that a learner sees.
        sources: source code of each example, shape (N,).
        names: the name behind each code.
        true_labels: labels before noise, int64, shape (N,).
        corrupted: where the label was replaced, bool, shape (N,).
        origins: position of each example in the images it was made from, shape (N,).
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
    """Divide clean images into sources that share no example, and spoil each as its spec says.

    Which examples, labels and order source i gets is drawn from (seed, i). A source holds its classes in the
    proportion of its class_weights, without them in that of the data. Images in memory are transformed at
    once, images behind files when they are read.

    Raises:
        ConfigError: if names repeat, a class is unknown, or a spec does not fit these images.
        DataError: if a label is not in 0..n_classes-1, or a source asks for more examples than there are.
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
    given = np.concatenate([np.zeros_like(quotas[:1]), quotas.cumsum(axis=0)])
    origins, noisy, copies = [], [], []
    for i, spec in enumerate(specs):
        rng = np.random.default_rng((SOURCE, seed, i))
        mine = [queue[given[i, c] : given[i + 1, c]] for c, queue in enumerate(queues)]
        distinct = rng.permutation(np.concatenate(mine))
        seen = _redraw(labels[distinct], spec, n_classes, rng)
        copy, which = np.divmod(np.arange(sizes[i]), len(distinct))
        origins.append(distinct[which])
        noisy.append(seen[which])
        copies.append(copy)

    taken = np.concatenate(origins)
    true_labels, seen_labels = images.labels[taken], torch.from_numpy(np.concatenate(noisy))
    sources = np.repeat(np.arange(len(specs)), sizes)
    return SyntheticPool(
        images=_transformed(images.take(taken).relabel(seen_labels), specs, sources),
        sources=sources,
        names=names,
        true_labels=true_labels,
        corrupted=(true_labels != seen_labels).numpy(),
        origins=taken,
        copies=np.concatenate(copies),
    )


def source_sizes(specs: Sequence[SyntheticSource], counts: np.ndarray, n_classes: int) -> np.ndarray:
    """How many examples each source gets, shape (S,), of `counts` images of each class (shape (n_classes,)).

    Raises:
        ConfigError: if a class is unknown. DataError: if a source asks for more examples than there are.
    """
    return _quotas(specs, counts, n_classes)[1]


def _redraw(labels: np.ndarray, spec: SyntheticSource, n_classes: int, rng: np.random.Generator) -> np.ndarray:
    """With probability `label_noise` another class, each of the others equally likely."""
    if spec.label_noise > 0 and n_classes < 2:
        raise ConfigError(f"source {spec.name!r}: label_noise needs at least two classes")
    replaced = rng.random(len(labels)) < spec.label_noise
    shift = rng.integers(1, max(2, n_classes), len(labels))
    return np.where(replaced, (labels + shift) % n_classes, labels)


def _quotas(specs: Sequence[SyntheticSource], counts: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct examples of each class for each source, shape (S, n_classes), and the sources' sizes, (S,)."""
    weights = np.array([spec.weights(n_classes) for spec in specs])
    quotas = np.zeros((len(specs), n_classes), dtype=np.int64)
    sizes = np.array([spec.size or 0 for spec in specs])
    left = counts.copy()

    # The choosiest first: a source that takes any class must not use up what another cannot do without.
    sized = [i for i, spec in enumerate(specs) if spec.size is not None]
    for i in sorted(sized, key=lambda i: ((weights[i] > 0).sum(), specs[i].class_weights is None)):
        distinct = -(-sizes[i] // specs[i].duplicates)
        quotas[i] = _apportion(distinct, _proportions(specs[i], weights[i], left))
        if (quotas[i] > left).any() or quotas[i].sum() < distinct:
            there = {c: int(left[c]) for c in np.flatnonzero(weights[i])}
            raise DataError(
                f"source {specs[i].name!r} needs {distinct} distinct examples, and {sum(there.values())} are "
                f"there for it (by class: {there}): make it smaller, or give more data"
            )
        left -= quotas[i]

    shares = np.zeros_like(quotas)
    equal = [i for i, spec in enumerate(specs) if spec.size is None]
    for c in range(n_classes):
        takers = sorted((i for i in equal if weights[i, c] > 0), key=lambda i: (shares[i].sum(), i))
        for rank, i in enumerate(takers):
            shares[i, c] = left[c] // len(takers) + (rank < left[c] % len(takers))
    for i in equal:
        proportions = _proportions(specs[i], weights[i], shares[i])
        sizes[i] = _largest_total(proportions, shares[i])
        if sizes[i] == 0:
            raise DataError(f"nothing is left for source {specs[i].name!r}: make others smaller, or give more data")
        quotas[i] = _apportion(-(-sizes[i] // specs[i].duplicates), proportions)
    return quotas, sizes


def _proportions(spec: SyntheticSource, weights: np.ndarray, available: np.ndarray) -> np.ndarray:
    return weights if spec.class_weights is not None else np.where(weights > 0, available, 0)


def _largest_total(proportions: np.ndarray, available: np.ndarray) -> int:
    """How many examples can be taken in these proportions."""
    wanted = proportions > 0
    if not wanted.any():
        return 0
    return math.floor((available[wanted] * proportions.sum() / proportions[wanted]).min() + 1e-9)


def _apportion(total: int, proportions: np.ndarray) -> np.ndarray:
    """Whole numbers that sum to `total`, by largest remainder; all 0 if every proportion is 0."""
    if proportions.sum() == 0:
        return np.zeros(len(proportions), dtype=np.int64)
    exact = (total * proportions / proportions.sum()).round(9)
    whole = np.floor(exact).astype(np.int64)
    most_left = np.argsort(whole - exact, kind="stable")
    whole[most_left[: total - whole.sum()]] += 1
    return whole


class TransformedImages(Images):
    """Images behind files that are transformed as they are read.

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
            where = torch.from_numpy(names == name)
            images[where] = TRANSFORMS[name](images[where])
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
"""What a source can do to its images, by name."""
