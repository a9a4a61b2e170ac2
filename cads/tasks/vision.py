"""The vision task: image classification with a small network, or any classifier of torchvision."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.nn import functional

from cads.errors import ConfigError, DataError
from cads.order import numbered
from cads.scoring import evaluating
from cads.task import Batch, Metrics, Pool, Task
from cads.tasks.calibration import calibrated_losses
from cads.tasks.image_sets import (
    load_arrays,
    load_cifar,
    load_digits,
    load_fashion_mnist,
    load_hub,
    load_image_folder,
)
from cads.tasks.images import ImageData, Images, ImageTensors, chunk_size
from cads.tasks.networks import Network
from cads.tasks.sources import SourcedImages, SourceSpec, make_sources

if TYPE_CHECKING:
    from cads.trainer import TrainConfig

log = logging.getLogger(__name__)

Dataset = Literal["digits", "fashion-mnist", "cifar10", "cifar100", "folder", "arrays", "hub"]

MOMENTS_FROM = 10_000
"""Images, evenly spaced over the pool, from which mean and standard deviation are computed."""

SPLIT, TEST = 3, 4
"""First words of the seeds by which the training split is divided, and the test set drawn."""


@dataclass
class VisionConfig:
    """Image classification: which images, in which sources, and which network."""

    dataset: Dataset = "digits"
    """digits (scikit-learn), fashion-mnist, cifar10, cifar100, folder (image files), arrays (`.npy` files, mapped
    into memory), or hub (`datasets`: a name, or a folder that `save_to_disk` wrote, which stays on disk)."""
    path: str | None = None
    """Folder of the data, or name of a hub data set; null: where it is usually installed or downloaded."""
    download: bool = False
    """Allow torchvision to fetch data and pretrained weights that are missing."""
    image_column: str = "image"
    """hub: the column of images."""
    label_column: str = "label"
    """hub: the column of labels."""
    source_column: str | None = None
    """hub: the column that says where an example comes from; null: no given sources."""
    image_size: int | None = None
    """Scale images to this many pixels square; null: as they are (files: all as the first one)."""
    model: str = "mlp"
    """mlp (one hidden layer), cnn (two convolutions), or any classifier of torchvision, such as resnet18."""
    hidden: int = 128
    """mlp: hidden units."""
    channels: int = 16
    """cnn: channels of the first convolution; the second has twice as many."""
    stride: int = 2
    """cnn: stride of the first convolution; 4 is several times faster on 28x28 images, and a little worse."""
    pretrained: bool = False
    """torchvision: start from its pretrained weights; a head of another size starts fresh."""
    n_target: int | None = None
    """Clean examples of the training split that selection optimises for; null: a tenth of it."""
    n_test: int | None = None
    """Clean test examples; null: the data set's test split, where there is none a fifth of all."""
    n_pool: int | None = None
    """Examples of the training split for the pool, or to make its sources from; null: all the rest."""
    sources: list[SourceSpec] = field(default_factory=list)
    """Sources to make from the pool; empty: those that the data has, if any."""
    data_seed: int = 0
    """Of what goes into target, test, pool and sources, and of the label noise."""

    def __post_init__(self) -> None:
        if self.dataset not in get_args(Dataset):
            raise ConfigError(f"dataset = {self.dataset!r}: choose from {list(get_args(Dataset))}")
        if self.dataset in ("folder", "arrays", "hub") and not self.path:
            raise ConfigError(f"dataset = {self.dataset!r} needs a path: the folder, or the name on the hub")
        for name in ("image_size", "n_target", "n_test", "n_pool"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: it must be at least 1")
        if self.data_seed < 0:
            raise ConfigError(f"data_seed = {self.data_seed}: it must be >= 0")
        names = [spec.name for spec in self.sources]
        if len(set(names)) < len(names):
            raise ConfigError(f"sources {names}: each needs its own name")
        self.network()

    def build(self, recipe: TrainConfig) -> VisionTask:
        """Load the data, divide it, make the sources.

        Raises:
            DataError: if the data is missing, damaged or too small.
        """
        data = self._load()
        positions, ids, target, test = self._divide(data)
        n_classes = len(data.classes)
        truth: SourcedImages | None = None
        if self.sources:
            clean = data.train.take(positions)
            check_labels(clean, n_classes, ids, "pool")
            truth = make_sources(clean, self.sources, n_classes, self.data_seed)
            pool = _sourced_pool(truth, ids)
        else:
            pool = _given_pool(data, positions, ids)
        return VisionTask(
            pool,
            target=target,
            test=test,
            classes=data.classes,
            build_model=partial(self.network().build, data.train.shape, n_classes),
            recipe=recipe,
            truth=truth,
            name=f"vision/{self.dataset}",
        )

    def sketch(self, recipe: TrainConfig) -> VisionTask:
        """The task with shapes in place of images and of weights; see `cads.tasks.vision_sketch`."""
        return sketch(self, recipe)

    def network(self) -> Network:
        """Which network, but not yet for which images."""
        return Network(self.model, self.hidden, self.channels, self.stride, self.pretrained, self.download)

    def _load(self) -> ImageData:
        if self.dataset == "folder":
            return load_image_folder(str(self.path), self.image_size)
        if self.dataset == "arrays":
            return load_arrays(str(self.path), self.image_size)
        if self.dataset == "hub":
            columns = (self.image_column, self.label_column, self.source_column)
            return load_hub(str(self.path), *columns, size=self.image_size)
        if self.dataset == "digits":
            data = load_digits()
        elif self.dataset == "fashion-mnist":
            data = load_fashion_mnist(self.path, self.download)
        else:
            data = load_cifar(self.dataset, self.path, self.download)
        return data if self.image_size is None else _resized(data, self.image_size)

    def _divide(self, data: ImageData) -> tuple[np.ndarray, pa.Array, Pool, Pool]:
        """Positions of the candidates in the training split and their ids; target; test. All disjoint."""
        ids = numbered("train", len(data.train))
        order = np.random.default_rng((SPLIT, self.data_seed)).permutation(len(data.train))
        n_test, n_target, n_pool = self.sizes(len(data.train), None if data.test is None else len(data.test))
        if data.test is None:
            where, order = np.sort(order[:n_test]), order[n_test:]
            test = Pool(ids.take(pa.array(where)), data.train.take(where), name="test set")
        else:
            test = self._own_test(data.test)
        where = np.sort(order[:n_target])
        target = Pool(ids.take(pa.array(where)), data.train.take(where), name="target")
        where = np.sort(order[n_target : n_target + n_pool])
        return where, ids.take(pa.array(where)), target, test

    def sizes(self, n_train: int, n_own_test: int | None) -> tuple[int, int, int]:
        """Examples of test set, target and pool; without a test split of its own, the test set is of the training's."""
        if n_own_test is None:
            taken = n_test = n_train // 5 if self.n_test is None else self.n_test
        else:
            taken, n_test = 0, n_own_test if self.n_test is None else self.n_test
        left = max(0, n_train - taken)
        n_target = max(1, left // 10) if self.n_target is None else self.n_target
        n_pool = max(1, left - n_target) if self.n_pool is None else self.n_pool
        if n_target + n_pool > left:
            raise DataError(
                f"n_target = {n_target} and n_pool = {n_pool} are more than the {left} examples there "
                f"are ({n_train} for training, less {taken} for the test set): ask for fewer"
            )
        return n_test, n_target, n_pool

    def _own_test(self, images: Images) -> Pool:
        where = np.arange(len(images))
        if self.n_test is not None:
            if self.n_test > len(images):
                raise DataError(f"n_test = {self.n_test}: the test split has {len(images)} examples; ask for fewer")
            rng = np.random.default_rng((TEST, self.data_seed))
            where = np.sort(rng.permutation(len(images))[: self.n_test])
        return Pool(numbered("test", len(images)).take(pa.array(where)), images.take(where), name="test set")


class VisionTask(Task):
    """Image classification by cross entropy.

    Images are normalised by the mean and standard deviation of the pool, channel by channel.

    Args:
        pool, target, test: pools of `Images`.
        classes: the name of each label.
        build_model: makes a fresh network on the CPU, from torch's global generator; its input has shape
            (B, C, H, W), its output (B, len(classes)).
        recipe: how the final model is trained.
        truth: of a pool with made sources: which labels were spoilt, and the true ones.
        name: what tables call the task.

    Raises:
        DataError: if labels are not in 0..len(classes)-1.
    """

    outer = "calibrated_loss"
    source_outer = "tempered_loss"
    averaged = ("loss", "calibrated_loss", "tempered_loss", "error")

    def __init__(
        self,
        pool: Pool,
        target: Pool,
        test: Pool,
        *,
        classes: Sequence[str],
        build_model: Callable[[], nn.Module],
        recipe: TrainConfig,
        truth: SourcedImages | None = None,
        name: str = "vision",
    ) -> None:
        self.pool, self.target, self.test = pool, target, test
        self.classes = tuple(classes)
        self.recipe = recipe
        self.truth = truth
        self.name = name
        self._build_model = build_model
        for part in (pool, target, test):
            check_labels(images_of(part), len(self.classes), part.ids, part.name)
        self.mean, self.std = channel_moments(images_of(pool))

    def model(self, seed: int) -> nn.Module:
        """A fresh network on the CPU."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._build_model()

    def groups(self, pool: Pool) -> np.ndarray | None:
        """The labels."""
        return images.labels.numpy() if isinstance(images := pool.examples, Images) else None

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Scores of the classes, shape (B, n_classes)."""
        images = batch.inputs["images"].float()
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (self.mean, self.std))
        output = model((images - mean) / std)
        # While they train, GoogLeNet and Inception return the scores of their side branches too.
        return output if isinstance(output, Tensor) else output.logits

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Cross entropy of each example, in nats, shape (B,)."""
        return functional.cross_entropy(self.logits(model, batch), batch.labels, reduction="none")

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the last linear layer of `model` reads, shape (B, D).

        Raises:
            ConfigError: if the model has no linear layer.
        """
        layer = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
        if layer is None:
            raise ConfigError(f"the model of {self.name} has no linear layer, so no features: name a backbone")
        read: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            self.logits(model, batch)
        finally:
            hook.remove()
        return read[-1].flatten(1)

    def nominal(self, model: nn.Module, batch: Batch) -> tuple[float, float]:
        """None: an image has no tokens, and a convolution uses each of its weights many times.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"`paper` accounting counts tokens, and {self.name} has images: use measured or analytic")

    def metrics(self, model: nn.Module, pool: Pool) -> Metrics:
        """Loss, calibrated loss and their mean (nats per example), error and accuracy (0 to 1), in evaluation mode.

        Where labels are noisy a network trained on them is less sure of itself: the loss takes that for a fault, which
        it is not in the end, and the calibrated loss, at one temperature a model, does not see it, though it tells
        early which sources are noisy. Their mean, the tempered loss, ranks short runs on whole sources best. Where
        single examples are chosen by their loss, what is left makes networks sure of themselves whatever it is worth.
        """
        means = {name: float(values.mean()) for name, values in self.metrics_by_example(model, pool).items()}
        return {**means, "accuracy": 1 - means["error"]}

    def metrics_by_example(self, model: nn.Module, pool: Pool) -> dict[str, np.ndarray]:
        """All `metrics` but the accuracy."""
        device = next(model.parameters()).device
        labels, size = images_of(pool).labels, chunk_size(images_of(pool).shape)
        with evaluating(model):
            pieces = [self.logits(model, batch.to(device)).cpu() for batch in pool.batches(size)]
        logits = torch.cat(pieces).double()
        calibrated, _ = calibrated_losses(logits, labels)
        loss = functional.cross_entropy(logits, labels, reduction="none")
        values = {
            "loss": loss,
            "calibrated_loss": calibrated,
            "tempered_loss": (loss + calibrated) / 2,
            "error": (logits.argmax(dim=1) != labels).double(),
        }
        return {name: value.numpy() for name, value in values.items()}


def channel_moments(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in grey levels, from exact sums: the order is no matter."""
    n = min(len(images), MOMENTS_FROM)
    positions = np.arange(n) * len(images) // n
    total = torch.zeros(2, images.shape[0], dtype=torch.int64)
    for chunk in np.array_split(positions, -(-n // chunk_size(images.shape))):
        x = images.pixels(chunk).long()
        total += torch.stack([x.sum(dim=(0, 2, 3)), x.square().sum(dim=(0, 2, 3))])
    mean, square = (total.double() / (n * images.shape[1] * images.shape[2])).unbind()
    # A channel that is constant up to rounding carries nothing: it is centred, not blown up.
    std = (square - mean.square()).clamp(min=1.0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def images_of(pool: Pool) -> Images:
    """The payload of a pool of images.

    Raises:
        DataError: if it holds something else.
    """
    if not isinstance(pool.examples, Images):
        raise DataError(f"the {pool.name} holds {type(pool.examples).__name__}: a vision task needs Images")
    return pool.examples


def check_labels(images: Images, n_classes: int, ids: pa.Array, name: str) -> None:
    wrong = torch.nonzero((images.labels < 0) | (images.labels >= n_classes)).flatten()
    if len(wrong):
        raise DataError(
            f"{len(wrong)} labels of the {name} are not in 0..{n_classes - 1}, such as those of "
            f"{ids.take(pa.array(wrong[:3].numpy())).to_pylist()}: correct or remove them"
        )


def _sourced_pool(truth: SourcedImages, ids: pa.Array) -> Pool:
    named, copies = ids.take(pa.array(truth.origins)), pa.array(truth.copies)
    repeated = pc.binary_join_element_wise(named, copies.cast(pa.string()), "#")
    return Pool(pc.if_else(pc.greater(copies, 0), repeated, named), truth.images, truth.sources, truth.names)


def _given_pool(data: ImageData, positions: np.ndarray, ids: pa.Array) -> Pool:
    images = data.train.take(positions)
    if data.sources is None:
        return Pool(ids, images)
    present, codes = np.unique(data.sources[positions], return_inverse=True)
    if len(present) < len(data.source_names):
        drawn = set(present.tolist())
        absent = [s for i, s in enumerate(data.source_names) if i not in drawn]
        log.warning("no example of the sources %s was drawn into the pool: they are left out", absent)
    return Pool(ids, images, codes, [data.source_names[i] for i in present])


def _resized(data: ImageData, size: int) -> ImageData:
    def resized(images: Images) -> Images:
        return images.resize(size) if isinstance(images, ImageTensors) else images

    test = None if data.test is None else resized(data.test)
    return replace(data, train=resized(data.train), test=test)
