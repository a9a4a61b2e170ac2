"""Images as the payload of a pool: in memory, in memory-mapped arrays, or in image files."""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cads.data.batch import Batch
from cads.data.hashing import row_digests
from cads.errors import CadsError, DataError
from cads.runtime.signals import Interrupted
from cads.tasks.vision.decoding import GREY, Opened, composed, mode_in_header, open_image, unreadable
from cads.tasks.vision.reading import Decoded, Reading, read_all, usable_cores

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

    def read(self) -> tuple[Images, dict[int, str]]:
        """The same images, checked, and for the position of each that cannot be read, why: none if they are arrays."""
        return self, {}

    def channel_sums(self, positions: np.ndarray) -> Tensor:
        """Sums of the values and of their squares over the images at `positions`, int64, shape (2, C)."""
        x = self.pixels(positions).long()
        return torch.stack([x.sum(dim=(0, 2, 3)), x.square().sum(dim=(0, 2, 3))])

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

    They are turned upright as their EXIF data says. Transparent pixels show white.

    Args:
        rows: any map-style data set: `rows[i][key]` is a PIL image, a uint8 array or the path of a file.
        key: 0 for the (image, label) pairs of torchvision, the image column for `datasets.Dataset`.
        labels: one integer for each row, read without decoding images.
        size: pixels of both sides after cropping centrally to a square. None: the size of the first image that can be
            read, to which all others are cropped and scaled.
        shape: (C, H, W) of all images, as of those of the training split. None: C = 1 if all images are grey, otherwise
            3, and the size as above. Their headers are read up to the first image in colour.
        headers: rows like `rows` that are cheaper to open, from which modes are read; None: `rows`.

    Raises:
        DataError: if there are no rows, or none of them can be read.
    """

    def __init__(
        self,
        rows: Any,
        key: int | str,
        labels: Sequence[int] | np.ndarray,
        size: int | None = None,
        shape: tuple[int, int, int] | None = None,
        headers: Any = None,
    ) -> None:
        if len(rows) != len(labels) or len(rows) == 0:
            raise DataError(f"{len(rows)} images with {len(labels)} labels: give one each, and at least one")
        self._rows, self._key = rows, key
        self._index = np.arange(len(rows))
        self._reading: Reading | None = None
        self.labels = torch.tensor(np.asarray(labels), dtype=torch.int64)
        self.shape = self._shape_of_all(size, rows if headers is None else headers) if shape is None else shape

    def pixels(self, positions: np.ndarray) -> Tensor:
        """The images at `positions`, decoded, cropped and scaled."""
        return torch.stack([torch.from_numpy(self._read(int(row)).pixels) for row in self._index[positions]])

    def take(self, positions: np.ndarray) -> ImageFiles:
        """The images at `positions`; nothing is decoded."""
        taken = copy.copy(self)
        taken.__dict__.pop("_digests", None)
        taken._index = self._index[positions]
        taken._reading = None if self._reading is None else self._reading.take(positions)
        taken.labels = self.labels[torch.tensor(positions, dtype=torch.int64)]
        return taken

    def read(self) -> tuple[ImageFiles, dict[int, str]]:
        """The same images, all decoded once, by several threads if they are files.

        Returns:
            the images, whose digests and sums are known from now on;
            for the position of each image that cannot be read, why. Such images must be left out.
        """
        if self._reading is not None:
            return self, {}
        # PIL registers its decoders when the first file needs one; threads must not see half of them.
        Image.init()
        n_threads = usable_cores() if isinstance(self._rows, list) else 1
        read = copy.copy(self)
        read._reading, errors = read_all(self._read, self._index, self.shape[0], n_threads)
        return read, errors

    @property
    def reading(self) -> Reading | None:
        """What is known of the images since `read`."""
        return self._reading

    def digests(self) -> pa.Array:
        """A hash of each image's pixels."""
        return super().digests() if self._reading is None else self._reading.digests

    def channel_sums(self, positions: np.ndarray) -> Tensor:
        """Sums over the images at `positions`; nothing is decoded after `read`."""
        if self._reading is None:
            return super().channel_sums(positions)
        return torch.from_numpy(self._reading.sums[positions].sum(axis=0))

    def _shape_of_all(self, size: int | None, headers: Any) -> tuple[int, int, int]:
        first = self._first_readable()
        width, height = first.size if size is None else (size, size)
        in_colour = first.mode not in GREY or any(self._in_colour(row, headers) for row in range(len(headers)))
        return (3 if in_colour else 1), height, width

    def _first_readable(self) -> Image.Image:
        first_error: DataError | None = None
        for row in range(len(self._rows)):
            try:
                return self._open(row).image
            except DataError as error:
                first_error = first_error or error
        assert first_error is not None
        if len(self._rows) == 1:
            raise first_error
        raise DataError(f"none of {len(self._rows)} images can be read; the first: {first_error}") from first_error

    def _in_colour(self, row: int, headers: Any) -> bool:
        """Whether an image can be read and has colours; grey images are not decoded."""
        try:
            if mode_in_header(headers[row][self._key]) in GREY:
                return False
        except Interrupted:
            raise
        except Exception:  # The image may still be readable, such as an array, which has no header.
            pass
        try:
            return self._open(row).image.mode not in GREY
        except DataError:
            return False

    def _open(self, row: int) -> Opened:
        name = f"row {row}"
        try:
            item = self._rows[row][self._key]
        except CadsError:
            raise
        except Exception as error:  # `datasets` decodes images when a row is read.
            raise unreadable(name, error) from error
        return open_image(item, name)

    def _read(self, row: int) -> Decoded:
        channels, height, width = self.shape
        image, has_more_frames, name = self._open(row)
        size = image.size
        try:
            image = composed(image, channels)
        except (OSError, ValueError) as error:
            raise unreadable(name, error) from error
        if size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        array = np.array(image).reshape(height, width, -1)
        return Decoded(np.ascontiguousarray(array.transpose(2, 0, 1)), size, has_more_frames)


@dataclass(frozen=True)
class ImageData:
    """A data set as it was loaded.

    Attributes:
        train: the training split, or all images.
        test: the test split of the data set, or None.
        classes: name of each label.
        sources: source code of each training image, shape (N,), or None.
        source_names: the name behind each code.
        target: the split that is the target, or None.
        train_ids, target_ids, test_ids: ids of the images of each split; None: they are numbered.
        left_out: number and names of what was left out, by the reason.
    """

    train: Images
    test: Images | None
    classes: tuple[str, ...]
    sources: np.ndarray | None = None
    source_names: tuple[str, ...] = ()
    target: Images | None = None
    train_ids: pa.Array | None = None
    target_ids: pa.Array | None = None
    test_ids: pa.Array | None = None
    left_out: dict[str, Any] = field(default_factory=dict)
