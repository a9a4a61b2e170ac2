"""The vision task: image classification with a small network or any classifier of torchvision."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional

from cads.data.batch import Batch
from cads.data.draws import draw
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError
from cads.scoring.pool_scores import evaluating
from cads.seeding import derive
from cads.task import Metrics, Task
from cads.tasks.last_layer import last_layer_inputs
from cads.tasks.vision.augmentation import Augmentation
from cads.tasks.vision.calibration import calibrated_losses
from cads.tasks.vision.descriptors import N_DESCRIPTORS, describe_images, describing_flops
from cads.tasks.vision.images import Images, chunk_size
from cads.tasks.vision.synthetic_sources import SyntheticPool

if TYPE_CHECKING:
    from cads.recipe import TrainConfig

log = logging.getLogger(__name__)

MOMENTS_FROM = 10_000
"""Random images of the pool from which mean and standard deviation are computed."""


class VisionTask(Task):
    """Image classification by cross entropy.

    Images are normalised by the mean and standard deviation of the pool, channel by channel.

    Args:
        pool, target, test: pools of `Images`.
        classes: the name of each label.
        build_model: makes a fresh network on the CPU, from torch's global generator; its input has shape
            (B, C, H, W), its output (B, len(classes)).
        recipe: how the final model is trained.
        augmentation: changes the images of training steps, and no others; None: they stay as they are.
        weights: hash of the file of weights from which networks start, or None.
        truth: of a pool with synthetic sources: the true labels, and which labels are noisy.
        name: of the task, in tables.

    Attributes:
        counts: number and names of what was left out of the data, by the reason.

    Raises:
        DataError: if labels are not in 0..len(classes)-1.
    """

    outer = "calibrated_loss"
    source_outer = "tempered_loss"
    n_descriptors = N_DESCRIPTORS
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
        truth: SyntheticPool | None = None,
        augmentation: Augmentation | None = None,
        weights: str | None = None,
        name: str = "vision",
    ) -> None:
        self.pool, self.target, self.test = pool, target, test
        self.classes = tuple(classes)
        self.recipe = recipe
        self.truth = truth
        self.name = name
        self.counts: dict[str, Any] = {}
        self._build_model = build_model
        self._weights = weights
        self._augmentation = augmentation
        if augmentation is not None:
            augmentation.check(images_of(pool).shape)
            if recipe.replicas == "batched":
                raise ConfigError(
                    "transforms with replicas = 'batched': batched replicas share their images: use 'auto'"
                )
            self.recipe = replace(recipe, replicas="loop")
        self._moments: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self.descriptor_flops = describing_flops(images_of(pool).shape)
        for part in (pool, target, test):
            check_labels(images_of(part), len(self.classes), part.ids, part.name)
        measured = np.sort(draw(pool, MOMENTS_FROM, derive(0, "moments"))) if len(pool) > MOMENTS_FROM else None
        self.mean, self.std = channel_moments(images_of(pool), measured)

    def model(self, seed: int) -> nn.Module:
        """A fresh network on the CPU."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._build_model()

    def groups(self, pool: Pool) -> np.ndarray | None:
        """The labels."""
        return images.labels.numpy() if isinstance(images := pool.examples, Images) else None

    def descriptors(self, pool: Pool, positions: np.ndarray) -> np.ndarray:
        """What images look like; see `describe_images`."""
        return describe_images(images_of(pool).pixels(positions))

    @property
    def guess_loss(self) -> float:
        """That of equal probabilities of all classes."""
        return math.log(len(self.classes))

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Scores of the classes, shape (B, n_classes)."""
        images = batch.inputs["images"].float()
        mean, std = self._moments_on(images.device)
        output = model((images - mean) / std)
        # While they train, GoogLeNet and Inception return the scores of their side branches too.
        return output if isinstance(output, Tensor) else output.logits

    def _moments_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, shape (C, 1, 1); they are copied to a device once."""
        key = (device, self.mean, self.std)
        if key not in self._moments:
            # Later steps use the tensors outside of the inference mode, or the transform, in which they are made.
            with torch.inference_mode(False):
                mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (self.mean, self.std))
            if is_functorch_wrapped_tensor(mean):
                return mean, std
            self._moments[key] = mean, std
        return self._moments[key]

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Cross entropy of each example, in nats, shape (B,)."""
        return functional.cross_entropy(self.logits(model, batch), batch.labels, reduction="none")

    def training_losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The losses that a training step minimises, shape (B,): those of changed images, if there is augmentation."""
        if self._augmentation is not None:
            batch = replace(batch, inputs={"images": self._augmentation(batch.inputs["images"])})
        return self.losses(model, batch)

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of data and of given weights, and the augmentation."""
        given = {
            "weights": self._weights,
            "transforms": None if self._augmentation is None else repr(self._augmentation),
        }
        return super().identity | {name: value for name, value in given.items() if value is not None}

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The inputs of the last linear layer of `model`, shape (B, D).

        Raises:
            ConfigError: if the model has no linear layer.
        """
        return last_layer_inputs(model, lambda: self.logits(model, batch), self.name)

    def nominal(self, model: nn.Module, batch: Batch) -> tuple[float, float]:
        """Undefined: an image has no tokens, and a convolution uses each of its weights many times.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"`paper` accounting counts tokens, and {self.name} has images: use measured or analytic")

    def metrics(self, model: nn.Module, pool: Pool) -> Metrics:
        """Loss, calibrated loss and their mean (nats per example), error and accuracy (0 to 1), in evaluation mode.

        A network that is trained on noisy labels is less confident. The loss penalises the lower confidence, which does
        no harm in the end. The calibrated loss, at one temperature per model, does not depend on confidence, and tells
        early which sources are noisy. `tempered_loss`, the mean of the two, ranks trials on whole sources best. Where
        single examples are selected by their loss, the selected ones make networks confident whatever their value.
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


def channel_moments(images: Images, positions: np.ndarray | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in grey levels, from exact sums that no order of images changes.

    Args:
        positions: of the images that are measured, int64; None for all of them.
    """
    positions = np.arange(len(images)) if positions is None else positions
    n = len(positions)
    total = torch.zeros(2, images.shape[0], dtype=torch.int64)
    for chunk in np.array_split(positions, -(-n // chunk_size(images.shape))):
        total += images.channel_sums(chunk)
    mean, square = (total.double() / (n * images.shape[1] * images.shape[2])).unbind()
    # A channel that is constant up to rounding has no information: it is centred, and its noise is not amplified.
    std = (square - mean.square()).clamp(min=1.0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def images_of(pool: Pool) -> Images:
    """The payload of a pool of images.

    Raises:
        DataError: if it holds another payload.
    """
    if not isinstance(pool.examples, Images):
        raise DataError(f"the {pool.name} holds {type(pool.examples).__name__}: a vision task needs Images")
    return pool.examples


def check_labels(images: Images, n_classes: int, ids: pa.Array, name: str) -> None:
    """Refuse labels that are not classes.

    Raises:
        DataError: naming the first examples.
    """
    wrong = torch.nonzero((images.labels < 0) | (images.labels >= n_classes)).flatten()
    if len(wrong):
        raise DataError(
            f"{len(wrong)} labels of the {name} are not in 0..{n_classes - 1}, such as those of "
            f"{ids.take(pa.array(wrong[:3].numpy())).to_pylist()}: correct or remove them"
        )
