"""The vision task for `cads plan`, without images or weights: enough to compute costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.task import Task
from cads.tasks.vision.datasets import FASHION_CLASSES
from cads.tasks.vision.task import VisionTask

if TYPE_CHECKING:
    from cads.recipe import TrainConfig


@dataclass(frozen=True)
class DatasetSizes:
    """A data set whose sizes are known without opening it."""

    n_train: int
    n_test: int | None
    shape: tuple[int, int, int]
    classes: tuple[str, ...]

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR100_CLASSES = (
    *("apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle"),
    *("bicycle", "bottle", "bowl", "boy", "bridge", "bus", "butterfly", "camel"),
    *("can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud"),
    *("cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant"),
    *("flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard"),
    *("lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree"),
    *("motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter"),
    *("palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine"),
    *("possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea"),
    *("seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider"),
    *("squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television"),
    *("tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale"),
    *("willow_tree", "wolf", "woman", "worm"),
)

DATASET_SIZES = {
    "digits": DatasetSizes(1797, None, (1, 8, 8), tuple("0123456789")),
    "fashion-mnist": DatasetSizes(60_000, 10_000, (1, 28, 28), FASHION_CLASSES),
    "cifar10": DatasetSizes(50_000, 10_000, (3, 32, 32), CIFAR10_CLASSES),
    "cifar100": DatasetSizes(50_000, 10_000, (3, 32, 32), CIFAR100_CLASSES),
}


class MetaVisionTask(VisionTask):
    """An image task whose networks, and whose images if it has any, are on the meta device.

    Args:
        pool, target, test: pools of images or of their shapes.
        build_model, recipe, name: as for `VisionTask`.
        sample: makes a task with images, see `to_time`.
    """

    def __init__(
        self,
        pool: Pool,
        target: Pool,
        test: Pool,
        build_model: Callable[[], nn.Module],
        recipe: TrainConfig,
        name: str,
        sample: Callable[[], tuple[Task, float]],
    ) -> None:
        self._sample = sample
        self.pool, self.target, self.test = pool, target, test
        self.recipe, self.name = recipe, name
        self.mean, self.std = (0.0,), (1.0,)
        self._moments = {}
        self._build_model = build_model

    def model(self, seed: int) -> nn.Module:
        """The network without weights."""
        with torch.device("meta"):
            return super().model(seed)

    def to_time(self) -> tuple[Task, float]:
        """A task with images, or with some of many that would have to be decoded."""
        return self._sample()

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Scores of the classes on the meta device, shape (B, n_classes)."""
        return super().logits(model, batch.to("meta"))

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Cross entropy on the meta device, shape (B,)."""
        return super().losses(model, batch.to("meta"))
