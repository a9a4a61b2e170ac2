"""Networks for images: three small ones, and all classifiers of torchvision."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from cads.errors import ConfigError, DataError
from cads.tasks.vision.weights import WeightsFile, load_fitting

DEFAULT = "DEFAULT"
"""Name of the best weights that torchvision has for a network."""
WEIGHTS_NAME = re.compile(r"DEFAULT|[A-Z][A-Z0-9_]*_V\d+")
"""Names that torchvision gives to weights; everything else is a file."""
SMALL = ("mlp", "cnn", "resnet8")
"""Networks that are not torchvision's."""


@dataclass(frozen=True)
class Network:
    """The architecture of a network; shape of images and number of classes are given when it is built.

    Attributes:
        name: one of `SMALL`, or a classifier of torchvision.
        hidden: units of the mlp.
        channels: of the first convolution of cnn and resnet8; each later stage has twice as many as the one before.
        stride: of that convolution.
        pretrained: start from torchvision's weights, except where the number of classes differs.
        weights: the name of some of torchvision's weights, or a file; None: DEFAULT if `pretrained`, otherwise none.
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
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.pretrained and self.weights not in (None, DEFAULT):
            raise ConfigError(f"pretrained = true with weights = {self.weights!r}: leave out pretrained")
        for setting in ("hidden", "channels", "stride"):
            if getattr(self, setting) < 1:
                raise ConfigError(f"{setting} = {getattr(self, setting)}: it must be at least 1")
        if self.name in SMALL:
            if self.named_weights:
                raise ConfigError(
                    f"weights = {self.named_weights!r} with model = {self.name!r}: only torchvision's have weights; "
                    "a file of weights is read for any"
                )
            self._check_file()
            return
        import torchvision

        classifiers = torchvision.models.list_models(module=torchvision.models)
        if self.name not in classifiers:
            close = difflib.get_close_matches(self.name, [*SMALL, *classifiers], n=5, cutoff=0.4)
            raise ConfigError(
                f"model = {self.name!r} is unknown: choose {', '.join(SMALL)} or a classifier of torchvision; "
                f"names like it: {close}"
            )
        known = torchvision.models.get_model_weights(self.name).__members__
        if self.named_weights is not None and self.named_weights not in known:
            raise ConfigError(f"weights = {self.named_weights!r}: torchvision has {sorted(known)} for {self.name}")
        self._check_file()

    @property
    def named_weights(self) -> str | None:
        """The name of torchvision's weights, or None."""
        name = DEFAULT if self.pretrained else self.weights
        return name if name is not None and WEIGHTS_NAME.fullmatch(name) else None

    @property
    def weights_file(self) -> WeightsFile | None:
        """The file of weights, or None."""
        return None if self.weights is None or self.named_weights else WeightsFile(Path(self.weights))

    def _check_file(self) -> None:
        if self.weights_file is not None and not self.weights_file.path.is_file():
            raise ConfigError(
                f"weights = {self.weights!r} is no file: give one of safetensors or of a state dict, or DEFAULT for "
                "those of torchvision"
            )

    def build(self, shape: tuple[int, int, int], n_classes: int) -> nn.Module:
        """A fresh network for images of `shape` (C, H, W), with weights from torch's global generator, or as given.

        Raises:
            DataError: if weights are neither cached nor can be downloaded, cannot be loaded, or do not fit.
        """
        model = self._fresh(shape, n_classes)
        if self.weights_file is not None:
            self.weights_file.load_into(model)
        return model

    def _fresh(self, shape: tuple[int, int, int], n_classes: int) -> nn.Module:
        if self.name == "mlp":
            return nn.Sequential(
                nn.Flatten(),
                nn.Linear(math.prod(shape), self.hidden),
                nn.ReLU(),
                nn.Linear(self.hidden, n_classes),
            )
        if self.name == "cnn":
            return self._cnn(shape, n_classes)
        if self.name == "resnet8":
            return self._resnet8(shape[0], n_classes)
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

    def _resnet8(self, colours: int, n_classes: int) -> nn.Module:
        """The residual network of He et al. (2016, section 4.2) with n = 1: eight layers with weights.

        Its shortcuts between stages are 1x1 convolutions; there they are paddings.
        """
        from torchvision.models.resnet import BasicBlock

        widths = [self.channels, self.channels, 2 * self.channels, 4 * self.channels]
        blocks = []
        for stage, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 1 if stage == 0 else 2
            shortcut = None
            if stage:
                shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
            blocks.append(BasicBlock(before, after, stride, shortcut))
        return nn.Sequential(
            nn.Conv2d(colours, widths[0], 3, stride=self.stride, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], n_classes),
        )

    def _torchvision(self, n_classes: int) -> nn.Module:
        import torchvision

        model: nn.Module = torchvision.models.get_model(self.name, weights=None, num_classes=n_classes)
        if self.named_weights:
            load_fitting(model, self._weights(), f"{self.named_weights} of {self.name}")
        return model

    def _weights(self) -> dict[str, Tensor]:
        import torchvision

        weights = torchvision.models.get_model_weights(self.name)[str(self.named_weights)]
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
