"""Images as the payload of a pool: in memory, in memory-mapped arrays, or in image files."""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cads.data.batch import Batch
from cads.data.hashing import row_digests
from cads.errors import DataError

CHUNK = 1024
"""Most images in memory at once when all of a payload is read."""
CHUNK_VALUES = 2**24
"""Most values of these images: 64 MB as float32."""
CHANNELS = (1, 3)
"""Channels of an image: grey, or colour."""


class Images(ABC):
    """N labelled images of one shape (C, H, W): the base class of the payloads of a vision task.

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

    def digests(self) -> pa.Array:
        """A hash of each image's pixels; labels do not count, so that a relabelled copy is still a copy."""
        return self._digests

    def label_digest(self) -> bytes:
        """A hash of all labels, in order."""
        return hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=16).digest()

    @cached_property
    def _digests(self) -> pa.Array:
        count = chunk_size(self.shape)
        return pa.concat_arrays(
            [
                row_digests(self.pixels(np.arange(start, min(start + count, len(self)))).flatten(1).numpy())
                for start in range(0, len(self), count)
            ]
        )


def chunk_size(shape: tuple[int, ...]) -> int:
    """Number of images of `shape` (C, H, W) that are in memory at once when all of a payload is read."""
    return max(1, min(CHUNK, CHUNK_VALUES // math.prod(shape)))


class ImageTensors(Images):
    """Images in memory.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).

    Raises:
        DataError: if types, ranks or lengths differ from these.
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
        """The images at `size` x `size`; see `resized`."""
        return ImageTensors(resized(self.images, size), self.labels)


class ImageArrays(Images):
    """Images in arrays that may be memory-mapped files; only the images of a batch are read.

    Args:
        arrays: uint8, one after the other, each of shape (n, H, W), (n, H, W, C) or (n, C, H, W), with C = 1 or 3.
            If both the second and the last axis could be the channels, the last one is.
        labels: one integer for each image.
        size: pixels of both sides; images are scaled as they are read (bilinear, antialiased). None: not scaled.

    Raises:
        DataError: if types, shapes or lengths differ from these.
    """

    def __init__(self, arrays: Sequence[np.ndarray], labels: np.ndarray, size: int | None = None) -> None:
        self._arrays = [array for array in arrays if len(array)]
        if not self._arrays:
            raise DataError("there are no images: give at least one")
        first = self._arrays[0]
        for array in self._arrays:
            if array.dtype != np.uint8 or array.shape[1:] != first.shape[1:]:
                raise DataError(
                    f"images of type {array.dtype} and shape {array.shape} beside {first.dtype} and {first.shape}: "
                    "give uint8 of one shape"
                )
        self._axes, (channels, height, width) = _layout(first.shape)
        if not height * width:
            raise DataError(f"images of shape {first.shape} have no pixels: give at least one")
        self._ends = np.cumsum([len(array) for array in self._arrays])
        if labels.shape != (self._ends[-1],):
            raise DataError(f"{self._ends[-1]} images with labels of shape {labels.shape}: give one each")
        self._size = size
        self._index: np.ndarray | None = None
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.shape = (channels, height, width) if size is None else (channels, size, size)

    def pixels(self, positions: np.ndarray) -> Tensor:
        """The images at `positions`, copied out of their arrays."""
        rows = np.asarray(positions if self._index is None else self._index[positions], dtype=np.int64)
        stored = np.empty((len(rows), *self._arrays[0].shape[1:]), dtype=np.uint8)
        array_of = np.searchsorted(self._ends, rows, side="right")
        order = np.argsort(array_of, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(array_of[order])) + 1) if len(order) else ():
            array_index = array_of[group[0]]
            stored[group] = self._arrays[array_index][
                rows[group] - (self._ends[array_index] - len(self._arrays[array_index]))
            ]
        images = torch.from_numpy(stored.reshape(len(rows), *self._axes.stored)).permute(self._axes.order).contiguous()
        return images if self._size is None else resized(images, self._size)

    def take(self, positions: np.ndarray) -> ImageArrays:
        """The images at `positions`; nothing is read."""
        positions = np.asarray(positions, dtype=np.int64)
        taken = copy.copy(self)
        taken.__dict__.pop("_digests", None)
        taken._index = positions if self._index is None else self._index[positions]
        taken.labels = self.labels[torch.from_numpy(positions)]
        return taken


@dataclass(frozen=True)
class _Axes:
    """Axes of a stored array: the shape of an image with its channel axis, and the order of axes for (N, C, H, W)."""

    stored: tuple[int, ...]
    order: tuple[int, ...]


def _layout(shape: tuple[int, ...]) -> tuple[_Axes, tuple[int, int, int]]:
    if len(shape) == 3:
        return _Axes((1, *shape[1:]), (0, 1, 2, 3)), (1, shape[1], shape[2])
    if len(shape) == 4 and shape[3] in CHANNELS:
        return _Axes(shape[1:], (0, 3, 1, 2)), (shape[3], shape[1], shape[2])
    if len(shape) == 4 and shape[1] in CHANNELS:
        return _Axes(shape[1:], (0, 1, 2, 3)), (shape[1], shape[2], shape[3])
    raise DataError(f"images of shape {shape}: give (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3")


def resized(images: Tensor, size: int) -> Tensor:
    """Images (uint8, shape (B, C, H, W)) at `size` x `size`, bilinear with antialiasing."""
    from torchvision.transforms import functional

    scaled: Tensor = functional.resize(images, [size, size], antialias=True)
    return scaled


class ImageFiles(Images):
    """Images that are decoded when a batch needs them, so that a large data set stays on disk.

    Args:
        rows: any map-style data set: `rows[i][key]` is a PIL image, a uint8 array or the path of a file.
        key: 0 for the (image, label) pairs of torchvision, the image column for `datasets.Dataset`.
        labels: one integer for each row, read without decoding images.
        size: pixels of both sides after cropping centrally to a square. None: the size of the first image, to which
            all others are cropped and scaled.

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
        description: Any = f"row {row}"
        try:
            item = self._rows[row][self._key]
            if isinstance(item, str | Path):
                description = item
                item = Image.open(item)
            elif isinstance(item, np.ndarray):
                item = Image.fromarray(item)
            if not isinstance(item, Image.Image):
                raise DataError(f"image {description} is a {type(item).__name__}: every row needs an image")
            item.load()
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"image {description} cannot be read: {error}; repair or remove it") from error
        if item.mode in ("F", "I") or item.mode.startswith("I;"):
            raise DataError(f"image {description} has the mode {item.mode!r}: convert it to 8 bits a channel")
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
        train: the training split, or all images.
        test: the test split of the data set, or None.
        classes: name of each label.
        sources: source code of each training image, shape (N,), or None.
        source_names: the name behind each code.
    """

    train: Images
    test: Images | None
    classes: tuple[str, ...]
    sources: np.ndarray | None = None
    source_names: tuple[str, ...] = ()
