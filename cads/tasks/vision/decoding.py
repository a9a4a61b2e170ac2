"""Image files: opened, turned as their EXIF data says, composed on white, and brought to 8 bits a channel."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from cads.errors import CadsError, DataError

GREY = ("1", "L", "LA", "La")
"""Modes of PIL without colour."""
ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
"""Modes of PIL with an alpha channel. Other modes may have one transparent colour."""
WHITE = (255, 255, 255, 255)
"""What shows through transparent pixels."""


class Opened(NamedTuple):
    """An image in memory, whether its file holds further frames, which are not read, and what messages call it."""

    image: Image.Image
    has_more_frames: bool
    name: str


def open_image(item: Any, name: str) -> Opened:
    """A PIL image, an array (uint8, shape (H, W) or (H, W, C)) or the file at a path, decoded and upright.

    Args:
        item: the image, array or path.
        name: what messages call it, unless it is a path.

    Raises:
        DataError: if it is no image, cannot be decoded, or has more than 8 bits a channel.
    """
    if isinstance(item, str | Path):
        name = str(item)
    # PIL passes on exceptions of its many decoders. Any of them means that the image cannot be read.
    try:
        opened = _opened(item, name)
    except CadsError:
        raise
    except Exception as error:
        raise unreadable(name, error) from error
    mode = opened.image.mode
    if mode in ("F", "I") or mode.startswith("I;"):
        raise DataError(f"image {name} has the mode {mode!r}: convert it to 8 bits a channel")
    return opened


def unreadable(name: str, error: Exception) -> DataError:
    """The error for an image that cannot be read because of `error`."""
    return DataError(f"image {name} cannot be read: {error}; repair or remove it")


def _opened(item: Any, name: str) -> Opened:
    if isinstance(item, str | Path):
        with Image.open(item) as image:
            # The previews beside a photo in an MPO file are no frames.
            more = image.format != "MPO" and bool(getattr(image, "is_animated", False))
            return Opened(_upright(image), more, name)
    if isinstance(item, np.ndarray):
        item = Image.fromarray(item)
    if not isinstance(item, Image.Image):
        raise DataError(f"image {name} is a {type(item).__name__}: every row needs an image")
    return Opened(_upright(item), False, name)


def _upright(image: Image.Image) -> Image.Image:
    """The decoded image, turned and mirrored as its EXIF orientation says."""
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def mode_in_header(item: Any) -> str:
    """The mode of an image, without decoding it.

    Args:
        item: a PIL image, the path of a file, or a dictionary of `bytes` and `path`, as `datasets.Image` stores it.

    Raises:
        Exception: any exception of PIL, if the header cannot be read.
    """
    if isinstance(item, dict):
        item = item["path"] if item["bytes"] is None else io.BytesIO(item["bytes"])
    if isinstance(item, Image.Image):
        return str(item.mode)
    with Image.open(item) as image:
        return str(image.mode)


def composed(image: Image.Image, channels: int) -> Image.Image:
    """The image without alpha and palette: grey (`channels` = 1) or RGB (3). Transparent pixels show white."""
    if image.mode in ALPHA or "transparency" in image.info:
        # PIL converts premultiplied grey only to grey with alpha.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("L" if channels == 1 else "RGB")
