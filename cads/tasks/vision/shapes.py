"""The vision task for `cads plan`, without images or weights: enough to compute costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.tasks.vision.task import VisionTask

if TYPE_CHECKING:
    from cads.recipe import TrainConfig


@dataclass(frozen=True)
class DatasetSizes:
    """A data set whose sizes are known without opening it."""

    n_train: int
    n_test: int | None
    shape: tuple[int, int, int]
    n_classes: int


DATASET_SIZES = {
    "digits": DatasetSizes(1797, None, (1, 8, 8), 10),
    "fashion-mnist": DatasetSizes(60_000, 10_000, (1, 28, 28), 10),
    "cifar10": DatasetSizes(50_000, 10_000, (3, 32, 32), 10),
    "cifar100": DatasetSizes(50_000, 10_000, (3, 32, 32), 100),
}


class MetaVisionTask(VisionTask):
    """An image task whose networks, and whose images if it has any, are on the meta device.

    Args:
        pool, target, test: pools of images or of their shapes.
        build_model, recipe, name: as for `VisionTask`.
    """

    def __init__(
        self,
        pool: Pool,
        target: Pool,
        test: Pool,
        build_model: Callable[[], nn.Module],
        recipe: TrainConfig,
        name: str,
    ) -> None:
        self.pool, self.target, self.test = pool, target, test
        self.recipe, self.name = recipe, name
        self.mean, self.std = (0.0,), (1.0,)
        self._build_model = build_model

    def model(self, seed: int) -> nn.Module:
        """The network without weights."""
        with torch.device("meta"):
            return super().model(seed)

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Scores of the classes on the meta device, shape (B, n_classes)."""
        return super().logits(model, batch.to("meta"))

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Cross entropy on the meta device, shape (B,)."""
        return super().losses(model, batch.to("meta"))
