"""The vision task without images or weights: what `cads plan` needs to say what everything costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cads.task import Batch, Pool
from cads.tasks.shaped import Field, Shaped, shaped_pool
from cads.tasks.sources import source_sizes
from cads.tasks.vision import VisionConfig, VisionTask, images_of

if TYPE_CHECKING:
    from cads.trainer import TrainConfig


@dataclass(frozen=True)
class Known:
    """A data set whose sizes are known without opening it."""

    n_train: int
    n_test: int | None
    shape: tuple[int, int, int]
    n_classes: int


KNOWN = {
    "digits": Known(1797, None, (1, 8, 8), 10),
    "fashion-mnist": Known(60_000, 10_000, (1, 28, 28), 10),
    "cifar10": Known(50_000, 10_000, (3, 32, 32), 10),
    "cifar100": Known(50_000, 10_000, (3, 32, 32), 100),
}


def sketch(config: VisionConfig, recipe: TrainConfig) -> SketchedVision:
    """The task of `config`; its sources are as large as even classes make them.

    Only folders and hub data sets, whose sizes are not known beforehand, are opened.

    Raises:
        DataError: if the data is too small, or a folder or hub data set cannot be opened.
    """
    network = replace(config.network(), pretrained=False)
    if config.dataset not in KNOWN:
        real = config.build(recipe)
        build = partial(network.build, images_of(real.pool).shape, len(real.classes))
        return SketchedVision(real.pool, real.target, real.test, build, recipe, real.name)
    known, size = KNOWN[config.dataset], config.image_size
    shape = known.shape if size is None else (known.shape[0], size, size)
    n_test, n_target, n_pool = config.sizes(known.n_train, known.n_test)
    sources = None
    if config.sources:
        even = np.bincount(np.arange(n_pool) % known.n_classes, minlength=known.n_classes)
        sizes = source_sizes(config.sources, even, known.n_classes)
        sources = {spec.name: int(n) for spec, n in zip(config.sources, sizes, strict=True)}
        n_pool = sum(sources.values())
    image, label = {"images": Field(shape, torch.uint8)}, Field(())
    return SketchedVision(
        shaped_pool("pool", Shaped(n_pool, image, label), sources),
        shaped_pool("target", Shaped(n_target, image, label)),
        shaped_pool("test", Shaped(n_test, image, label)),
        partial(network.build, shape, known.n_classes),
        recipe,
        f"vision/{config.dataset}",
    )


class SketchedVision(VisionTask):
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
