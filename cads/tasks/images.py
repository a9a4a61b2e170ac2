"""Images as the payload of a pool, in memory or behind files."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cads.errors import DataError
from cads.task import Batch

CHUNK = 1024
"""Most images in memory at once when all of a payload is read."""


class Images(ABC):
    """N labelled images of one shape (C, H, W): what the payloads of a vision task have in common.

    Attributes:
        labels: int64, shape (N,).
        shape: (C, H, W).
    """

    labels: Tensor
    shape: tuple[int, int, int]

    @abstractmethod
    def pixels(self, positions: np.ndarray) -> Tensor:
        """The images at `positions`, uint8, shape (B, C, H, W)."""

    @abstractmethod
    def take(self, positions: np.ndarray) -> Images:
        """The images at `positions` (repeats allowed) as a payload of their own."""

    def relabel(self, labels: Tensor) -> Images:
        """The same images with other labels, shape (N,)."""
        relabelled = copy.copy(self)
        relabelled.labels = labels
        return relabelled

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, positions: np.ndarray) -> Batch:
        """The images at `positions`: input "images", uint8, shape (B, C, H, W)."""
        index = torch.tensor(positions, dtype=torch.int64)
        images = {"images": self.pixels(np.asarray(positions))}
        return Batch(images, self.labels[index], index, tokens=len(index), answer_tokens=len(index))

    def shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """All images cost the same."""
        return np.zeros(1, dtype=np.int64), np.zeros(len(self), dtype=np.int64)

    def digests(self) -> list[bytes]:
        """A hash of each image's pixels; labels do not count, so that a relabelled copy is still a copy."""
        return self._digests

    def label_digest(self) -> bytes:
        """A hash of all labels, in order."""
        return hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=16).digest()

    @cached_property
    def _digests(self) -> list[bytes]:
        digests: list[bytes] = []
        for start in range(0, len(self), CHUNK):
            rows = self.pixels(np.arange(start, min(start + CHUNK, len(self)))).flatten(1).numpy()
            digests += [hashlib.blake2b(row, digest_size=16).digest() for row in rows]
        return digests


class ImageTensors(Images):
    """Images in memory.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).

    Raises:
        DataError: if type, rank or lengths are not these.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(
                f"images of type {images.dtype} and shape {tuple(images.shape)}: give torch.uint8 of shape (N, C, H, W)"
            )
        if labels.shape != (len(images),):
            raise DataError(f"{len(images)} images with labels of shape {tuple(labels.shape)}: give one each")
        self.images = images.contiguous()
        self.labels = labels.to(torch.int64)
        self.shape = (images.shape[1], images.shape[2], images.shape[3])

    def pixels(self, positions: np.ndarray) -> Tensor:
        """The images at `positions`."""
        return self.images.index_select(0, torch.tensor(positions, dtype=torch.int64))

    def take(self, positions: np.ndarray) -> ImageTensors:
        """The images at `positions`, copied."""
        return ImageTensors(self.pixels(positions), self.labels[torch.tensor(positions, dtype=torch.int64)])

    def resize(self, size: int) -> ImageTensors:
        """The images at `size` x `size`, bilinear with antialiasing."""
        from torchvision.transforms import functional

        return ImageTensors(functional.resize(self.images, [size, size], antialias=True), self.labels)


class ImageFiles(Images):
    """Images that are decoded when a batch asks for them, so that a large data set stays on disk.

    Args:
        rows: any map-style data set: `rows[i][key]` is a PIL image, a uint8 array or the path of a file.
        key: 0 for the (image, label) pairs of torchvision, the image column for `datasets.Dataset`.
        labels: one integer a row, read without decoding.
        size: pixels of both sides after cropping centrally to a square, or None for the format of the
            first image: every other one is cropped and scaled to it.

    Raises:
        DataError: if there are no rows, or an image cannot be read.
    """

    def __init__(self, rows: Any, key: int | str, labels: Sequence[int] | np.ndarray, size: int | None = None) -> None:
        if len(rows) != len(labels) or len(rows) == 0:
            raise DataError(f"{len(rows)} images with {len(labels)} labels: give one each, and at least one")
        self._rows, self._key = rows, key
        self._index = np.arange(len(rows))
        self.labels = torch.tensor(np.asarray(labels), dtype=torch.int64)
        first = self._open(0)
        height, width = (first.height, first.width) if size is None else (size, size)
        self.shape = (1 if first.mode in ("1", "L") else 3, height, width)

    def pixels(self, positions: np.ndarray) -> Tensor:
        """The images at `positions`, decoded, cropped and scaled."""
        return torch.stack([self._read(int(row)) for row in self._index[positions]])

    def take(self, positions: np.ndarray) -> ImageFiles:
        """The images at `positions`; nothing is decoded."""
        taken = copy.copy(self)
        taken.__dict__.pop("_digests", None)
        taken._index = self._index[positions]
        taken.labels = self.labels[torch.tensor(positions, dtype=torch.int64)]
        return taken

    def reshaped(self, shape: tuple[int, int, int]) -> ImageFiles:
        """The images decoded to `shape` (C, H, W): C = 1 is grey, C = 3 is colour."""
        reshaped = copy.copy(self)
        reshaped.__dict__.pop("_digests", None)
        reshaped.shape = shape
        return reshaped

    def _open(self, row: int) -> Image.Image:
        where: Any = f"row {row}"
        try:
            item = self._rows[row][self._key]
            if isinstance(item, str | Path):
                where = item
                item = Image.open(item)
            elif isinstance(item, np.ndarray):
                item = Image.fromarray(item)
            if not isinstance(item, Image.Image):
                raise DataError(f"image {where} is a {type(item).__name__}: every row needs an image")
            item.load()
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"image {where} cannot be read: {error}; repair or remove it") from error
        if item.mode in ("F", "I") or item.mode.startswith("I;"):
            raise DataError(f"image {where} has the mode {item.mode!r}: convert it to 8 bits a channel")
        return item

    def _read(self, row: int) -> Tensor:
        channels, height, width = self.shape
        image = self._open(row).convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        array = np.array(image).reshape(height, width, -1)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class ImageData:
    """A data set as it was loaded.

    Attributes:
        train: the training split, or all there is.
        test: the data set's own test split, or None.
        classes: name of each label.
        sources: source code of each training image, shape (N,), or None.
        source_names: the name behind each code.
    """

    train: Images
    test: Images | None
    classes: tuple[str, ...]
    sources: np.ndarray | None = None
    source_names: tuple[str, ...] = ()
