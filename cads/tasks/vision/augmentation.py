"""Random changes of training images, such as flips and crops, by the transforms of torchvision."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cads.errors import ConfigError

Spec = str | dict[str, Any]
"""The name of a class of `torchvision.transforms.v2`, or `name` and its arguments."""


class Augmentation:
    """Transforms that are applied in turn to each image of a training step, and to no other image.

    They draw from torch's global generator, which a training run seeds at each step: a run that is repeated, or
    resumed, draws the same.

    Args:
        specs: of the transforms, such as "RandomHorizontalFlip" or {"name": "RandomCrop", "size": 28, "padding": 3}.

    Raises:
        ConfigError: if there is no such transform, or its arguments are refused.
    """

    def __init__(self, specs: Sequence[Spec]) -> None:
        self._transforms = [_transform(spec) for spec in specs]

    def __call__(self, images: Tensor) -> Tensor:
        """Images of the same shape and type, uint8, (B, C, H, W); each is changed on its own."""
        changed = []
        for image in images:
            result = image
            for transform in self._transforms:
                result = transform(result)
            changed.append(result)
        return torch.stack(changed)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse transforms that change the shape or the type of images.

        Args:
            shape: of an image, (C, H, W).

        Raises:
            ConfigError: naming the transforms, and what they give.
        """
        with torch.random.fork_rng(devices=[]):
            try:
                (image,) = self(torch.zeros((1, *shape), dtype=torch.uint8))
            except Exception as error:  # torchvision raises errors of many kinds.
                raise ConfigError(f"transforms = {self}: images of shape {shape} are refused: {error}") from error
        if image.shape != shape or image.dtype != torch.uint8:
            raise ConfigError(
                f"transforms = {self} make images of shape {tuple(image.shape)} and type {image.dtype} of {shape} and "
                "torch.uint8: they must keep both. image_size scales images, and cads normalises them"
            )

    def __repr__(self) -> str:
        return str([repr(transform) for transform in self._transforms])


def _transform(spec: Spec) -> Any:
    from torchvision.transforms import v2

    known = [n for n in dir(v2) if isinstance(getattr(v2, n), type) and issubclass(getattr(v2, n), v2.Transform)]
    arguments = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = arguments.pop("name", None)
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=3)
        raise ConfigError(
            f"transforms: {spec!r} names no transform of torchvision.transforms.v2"
            + (f": names like it: {close}" if close else ", such as RandomHorizontalFlip")
        )
    try:
        return getattr(v2, name)(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"transforms: {name} refuses {arguments}: {error}") from error
