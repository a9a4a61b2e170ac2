"""Networks for images: two small ones, and all classifiers of torchvision."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from cads.errors import ConfigError, DataError


@dataclass(frozen=True)
class Network:
    """The architecture of a network; shape of images and number of classes are given when it is built.

    Attributes:
        name: "mlp", "cnn", or a classifier of torchvision.
        hidden: units of the mlp.
        channels: of the first convolution of the cnn; the second has twice as many.
        stride: of the first convolution of the cnn.
        pretrained: start from torchvision's weights, except where the number of classes differs.
        download: allow torchvision to fetch weights that are not cached.

    Raises:
        ConfigError: if there is no such network, or a size is not positive.
    """

    name: str
    hidden: int = 128
    channels: int = 16
    stride: int = 2
    pretrained: bool = False
    download: bool = False

    def __post_init__(self) -> None:
        for setting in ("hidden", "channels", "stride"):
            if getattr(self, setting) < 1:
                raise ConfigError(f"{setting} = {getattr(self, setting)}: it must be at least 1")
        if self.name in ("mlp", "cnn"):
            if self.pretrained:
                raise ConfigError(f"pretrained = true with model = {self.name!r}: only torchvision's have weights")
            return
        import torchvision

        classifiers = torchvision.models.list_models(module=torchvision.models)
        if self.name not in classifiers:
            close = difflib.get_close_matches(self.name, ["mlp", "cnn", *classifiers], n=5, cutoff=0.4)
            raise ConfigError(
                f"model = {self.name!r} is unknown: choose mlp, cnn or a classifier of torchvision; "
                f"names like it: {close}"
            )

    def build(self, shape: tuple[int, int, int], n_classes: int) -> nn.Module:
        """A fresh network for images of `shape` (C, H, W), with weights from torch's global generator.

        Raises:
            DataError: if pretrained weights are neither cached nor can be downloaded, or cannot be loaded.
        """
        if self.name == "mlp":
            return nn.Sequential(
                nn.Flatten(),
                nn.Linear(math.prod(shape), self.hidden),
                nn.ReLU(),
                nn.Linear(self.hidden, n_classes),
            )
        if self.name == "cnn":
            return self._cnn(shape, n_classes)
        model = self._torchvision(n_classes)
        return nn.Sequential(GreyToColour(), model) if shape[0] == 1 else model

    def _cnn(self, shape: tuple[int, int, int], n_classes: int) -> nn.Module:
        colours, height, width = shape
        # Each convolution divides the sides by its stride, rounding up.
        total_stride = 2 * self.stride
        positions = -(-height // total_stride) * -(-width // total_stride)
        return nn.Sequential(
            nn.Conv2d(colours, self.channels, 5, stride=self.stride, padding=2),
            nn.ReLU(),
            nn.Conv2d(self.channels, 2 * self.channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * self.channels * positions, n_classes),
        )

    def _torchvision(self, n_classes: int) -> nn.Module:
        import torchvision

        model: nn.Module = torchvision.models.get_model(self.name, weights=None, num_classes=n_classes)
        if self.pretrained:
            shapes = {name: x.shape for name, x in model.state_dict().items()}
            fitting = {n: x for n, x in self._weights().items() if shapes.get(n) == x.shape}
            model.load_state_dict(fitting, strict=False)
        return model

    def _weights(self) -> dict[str, Tensor]:
        import torchvision

        weights = torchvision.models.get_model_weights(self.name).DEFAULT
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        remedy = f"put {weights.url} there, or allow the download (--task.download true)"
        if not (path.is_file() or self.download):
            raise DataError(f"the weights of {self.name} are not in {path}: {remedy}")
        try:
            # The hash of a cached file is not checked, so `weights_only` keeps the file from running code.
            state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            raise DataError(f"the weights of {self.name} cannot be loaded into {path} ({error}): {remedy}") from error
        return state


class GreyToColour(nn.Module):
    """Grey images, (B, 1, H, W), as colour images, (B, 3, H, W)."""

    def forward(self, images: Tensor) -> Tensor:
        """The one channel three times, without copying it."""
        return images.expand(-1, 3, -1, -1)
