"""The task that a folder of images is: its data set, the size of images, and a network for it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from cads.cli.recognition import SAVED, Inputs, image_column
from cads.errors import ConfigError, DataError
from cads.tasks.vision.folders import read_tree, splits_of

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
"""Columns that are taken for the label, the first that is present, where none is a `ClassLabel`."""
SOURCE_COLUMNS = ("source", "domain", "dataset", "subset")
"""Columns that are taken for the source of each image."""
HEADERS = 200
"""Images whose headers are read, at even distances."""
LARGE, SCALED = 64, 64
"""Pixels of a side above which images are scaled, and to how many."""


def image_task(inputs: Inputs) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of the task, and remarks on some of them.

    Raises:
        ConfigError: if there are held-out images and no pool.
        DataError: if the folder holds no images of classes.
    """
    if not inputs.images["pool"]:
        raise ConfigError("images of the target or of the test set are given, and none of the pool: give its folder")
    path = inputs.images["pool"][0]
    saved = any((Path(path) / name).is_file() for name in SAVED)
    fields: dict[str, Any] = {"dataset": "hub" if saved else "folder", "path": path}
    remarks: dict[str, str] = {}
    if saved:
        fields |= _columns(path)
        if inputs.images["target"] or inputs.images["test"]:
            raise ConfigError(
                f"{path} is a folder of `datasets`, whose splits are target and test set: leave --target and --test "
                "out, and name splits in the configuration (target_path, test_path)"
            )
        sizes = Counter({(0, 0): 1})
    else:
        fields |= {f"{part}_path": inputs.images[part][0] for part in ("target", "test") if inputs.images[part]}
        held_out = [Path(other) for part in ("target", "test") for other in inputs.images[part]]
        tree = read_tree(splits_of(Path(path), held_out).train, drop=True)
        sizes = _sizes([tree.path(parts) for parts in tree.files])
        has_sources = tree.depth == len(("source", "class", "file"))
        remarks["path"] = (
            "source/class/file: each folder of it is a source." if has_sources else "class/file, without sources."
        )
    (width, height), _ = sizes.most_common(1)[0]
    fields["model"] = "cnn"
    if max(width, height) > LARGE or len(sizes) > 1:
        fields["image_size"] = min(SCALED, *(min(size) for size in sizes)) if max(width, height) <= LARGE else SCALED
        said = f"{len(sizes)} sizes, most often" if len(sizes) > 1 else "all are"
        remarks["image_size"] = f"Pixels of each side: {said} {width}x{height}. More cost more, by the square."
    if max(width, height) > LARGE:
        fields["model"] = "resnet18"
    return fields, remarks


def _columns(path: str) -> dict[str, str]:
    """The columns of images, labels and sources of a folder of `datasets`.

    Raises:
        DataError: if no column is recognised as the label.
    """
    from datasets import ClassLabel, Dataset, load_from_disk

    loaded = load_from_disk(path)
    features = (loaded if isinstance(loaded, Dataset) else next(iter(loaded.values()))).features
    image = image_column(features)
    labels = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    label = next(iter([name for name in LABEL_COLUMNS if name in labels] or labels), None)
    label = label or next((name for name in LABEL_COLUMNS if name in features), None)
    if label is None:
        raise DataError(
            f"{path} has images (column {image!r}) and no column that looks like a label among {sorted(features)}: "
            f"rename it to `label`"
        )
    source = next((name for name in SOURCE_COLUMNS if name in features and name != label), None)
    found = {"image_column": str(image), "label_column": label}
    return found if source is None else {**found, "source_column": source}


def _sizes(files: list[str]) -> Counter[tuple[int, int]]:
    """Width and height of some images, by their headers; those that cannot be read do not count.

    Raises:
        DataError: if none can be read.
    """
    from PIL import Image

    sizes: Counter[tuple[int, int]] = Counter()
    for path in files[:: max(1, len(files) // HEADERS)]:
        try:
            with Image.open(path) as image:
                sizes[image.size] += 1
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    if not sizes:
        raise DataError(f"no image of {len(files)}, such as {files[0]}, can be read: repair them")
    return sizes
