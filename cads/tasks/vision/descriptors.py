"""What images look like, in a few numbers that no model computes: brightness, where the ink is, edges, contrast."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

GRID = 3
"""The thumbnail has GRID x GRID cells."""
N_DESCRIPTORS = GRID**2 + 5
COARSE = 8
"""Images of at least this many pixels a side are halved first: a quarter of the work, and less noise."""
SMALLEST = 0.01
"""Added to a divisor, in units of full brightness."""


def describe_images(pixels: Tensor) -> np.ndarray:
    """Descriptors of images, float32, shape (n, N_DESCRIPTORS).

    A thumbnail of the grey image; the mean absolute difference of neighbours across and down, and their ratio; the mean
    square; edges relative to contrast.

    Args:
        pixels: uint8, shape (n, C, H, W).
    """
    grey = pixels.float().mean(dim=1, keepdim=True) / 255
    if min(pixels.shape[2:]) >= COARSE:
        grey = functional.avg_pool2d(grey, 2)
    thumbnail = functional.adaptive_avg_pool2d(grey, GRID).flatten(1)
    grey = grey[:, 0]
    n_pixels = grey[0].numel() if len(grey) else 1
    across, down = (grey.diff(dim=dim).abs().sum(dim=(1, 2)) / n_pixels for dim in (2, 1))
    square = grey.square().mean(dim=(1, 2))
    contrast = (square - thumbnail.mean(dim=1).square()).clamp(min=SMALLEST**2).sqrt()
    others = [across, down, across / (down + SMALLEST), square, (across + down) / (contrast + SMALLEST)]
    return np.asarray(torch.cat([thumbnail, torch.stack(others, dim=1)], dim=1).numpy(), dtype=np.float32)


def describing_flops(shape: tuple[int, int, int]) -> float:
    """FLOPs for one image of `shape` (C, H, W): C + 2 a pixel, then 9 for each of a quarter as many."""
    channels, height, width = shape
    halved = min(height, width) >= COARSE
    return height * width * (channels + (2 + 9 / 4 if halved else 10)) + 16
