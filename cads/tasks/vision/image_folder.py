"""A folder of image files as a data set: classes, sources, splits, and what has to be left out."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from cads.errors import DataError
from cads.tasks.vision.folders import Tree, name_unused_neighbours, read_tree, splits_of
from cads.tasks.vision.images import ImageData, ImageFiles, Images
from cads.tasks.vision.left_out import LeftOut, first_error

log = logging.getLogger(__name__)


def load_image_folder(
    root: str | Path,
    size: int | None = None,
    target: str | Path | None = None,
    test: str | Path | None = None,
    *,
    drop: bool = False,
) -> ImageData:
    """A tree of image files: class/file, or source/class/file.

    If there is a train/, it holds the training images, val/ or validation/ beside it the target, and test/ the test
    set. The id of an image is the name of its file relative to `root`.

    Args:
        root: its folder.
        size: as for `ImageFiles`.
        target, test: folders of the target and of the test set, of the same kind; None: those beside train/, if any.
        drop: leave out what cannot be used: images that cannot be read or are at another level than most, and classes
            and sources without images. This decodes all images once.

    Raises:
        DataError: if there is no such folder, no image, or the levels are mixed; without `drop`, if a class or source
            has no image.
    """
    root = Path(root)
    given = [Path(path) for path in (target, test) if path is not None]
    splits = splits_of(root, given)
    name_unused_neighbours(root, given)
    left_out = LeftOut(drop)
    tree = read_tree(splits.train, drop)
    train = _Files(tree, tree.files, tree.ids(tree.files, root))
    left_out.add("images in no folder of a class", tree.ids(tree.astray, root))
    train = train.with_names_as_text(left_out)
    train, payload = _training_images(train, size, left_out)
    classes = tuple(sorted(set(train.class_names)))
    data = ImageData(payload, None, classes, train_ids=pa.array(train.ids, pa.string()))
    if train.tree.depth == 3:
        names, sources = np.unique([parts[0] for parts in train.files], return_inverse=True)
        data = replace(data, sources=sources, source_names=tuple(names.tolist()))
    shape = payload.shape
    held_out = {"train": splits.train}
    target_folder = _given(target, splits.target, "target", held_out)
    if target_folder is not None:
        ids, images = _held_out_images("target", read_tree(target_folder, drop), root, classes, shape, left_out)
        data = replace(data, target=images, target_ids=ids)
    test_folder = _given(test, splits.test, "test set", held_out)
    if test_folder is not None:
        ids, images = _held_out_images("test set", read_tree(test_folder, drop), root, classes, shape, left_out)
        data = replace(data, test=images, test_ids=ids)
    return replace(data, left_out=left_out.report(root))


@dataclass(frozen=True)
class _Files:
    """Some image files of a tree, and their ids."""

    tree: Tree
    files: list[tuple[str, ...]]
    ids: list[str]

    @property
    def class_names(self) -> list[str]:
        return [parts[-2] for parts in self.files]

    def subset(self, keep: np.ndarray) -> _Files:
        """The files at the positions `keep`."""
        return replace(self, files=[self.files[i] for i in keep], ids=[self.ids[i] for i in keep])

    def with_names_as_text(self, left_out: LeftOut) -> _Files:
        """The files whose names are text."""
        is_text = np.array([_is_text(name) for name in self.ids], dtype=bool)
        wrong = [ascii(self.ids[i]) for i in np.flatnonzero(~is_text)]
        left_out.add("images whose names are not UTF-8", wrong)
        return self.subset(np.flatnonzero(is_text))

    def images(self, classes: Sequence[str], size: int | None, shape: tuple[int, int, int] | None) -> ImageFiles:
        codes = {name: code for code, name in enumerate(classes)}
        labels = [codes[name] for name in self.class_names]
        return ImageFiles([(self.tree.path(parts),) for parts in self.files], 0, labels, size, shape)

    def readable(self, images: ImageFiles, left_out: LeftOut) -> tuple[_Files, ImageFiles]:
        """Without the images that cannot be read, if they may be left out; otherwise nothing is decoded."""
        if not left_out.drop:
            return self, images
        images, errors = images.read()
        left_out.add("images that cannot be read", [self.ids[i] for i in errors], first_error(errors))
        keep = np.delete(np.arange(len(self.ids)), list(errors))
        return self.subset(keep), images.take(keep)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _training_images(train: _Files, size: int | None, left_out: LeftOut) -> tuple[_Files, Images]:
    """The training images that can be used; their labels index the classes that have any."""
    root, everything = train.tree.root, train
    empty_classes, empty_sources = train.tree.empty()
    left_out.add(f"folders of classes without images in {root}", empty_classes)
    left_out.add(f"folders of sources without images in {root}", empty_sources)
    if not train.files:
        raise DataError(f"{root} holds no image that can be used: repair the images, or name another folder")
    classes = sorted(set(train.class_names))
    train, payload = train.readable(train.images(classes, size, None), left_out)
    if not train.files:
        raise DataError(f"{root} holds no image that can be read: repair the images, or name another folder")
    present = sorted(set(train.class_names))
    left_out.add(f"classes without readable images in {root}", sorted(set(classes) - set(present)))
    if train.tree.depth == 3:
        sources, remaining = ({parts[0] for parts in files.files} for files in (everything, train))
        left_out.add(f"sources without readable images in {root}", sorted(sources - remaining))
    codes = {name: code for code, name in enumerate(present)}
    return train, payload.relabel(torch.tensor([codes[name] for name in train.class_names]))


def _held_out_images(
    name: str, tree: Tree, root: Path, classes: tuple[str, ...], shape: tuple[int, int, int], left_out: LeftOut
) -> tuple[pa.Array, ImageFiles]:
    """The ids and images of the target or the test set, in the classes and the shape of the training images."""
    files = _Files(tree, tree.files, tree.ids(tree.files, root))
    left_out.add("images in no folder of a class", tree.ids(tree.astray, root))
    files = files.with_names_as_text(left_out)
    strange = set(files.class_names) - set(classes)
    strangers = sorted(strange)
    known = np.array([c not in strange for c in files.class_names], dtype=bool)
    if strangers and not left_out.drop:
        named = files.subset(np.flatnonzero(~known))
        verb = f"class {strangers[0]!r} is" if len(strangers) == 1 else f"classes {strangers} are"
        raise DataError(
            f"{len(named.ids)} images of the {name}, such as {named.ids[0]}: the {verb} not among the training images: "
            "give training images of them, remove these, or set drop: true to leave them out"
        )
    left_out.add(
        f"images of the {name} in classes that the training images lack", files.subset(np.flatnonzero(~known)).ids
    )
    files = files.subset(np.flatnonzero(known))
    if files.files:
        files, images = files.readable(files.images(classes, None, shape), left_out)
    if not files.files:
        raise DataError(f"{tree.root} holds no image that can be used as {name}: repair the images, or give others")
    absent = sorted(set(classes) - set(files.class_names))
    if absent:
        log.warning("the %s, %s, has no image of the classes %s", name, tree.root, absent)
    return pa.array(files.ids, pa.string()), images


def _given(path: str | Path | None, default: Path | None, name: str, others: dict[str, Path]) -> Path | None:
    """The folder of the target or the test set, which must not hold or be that of another split."""
    folder = default if path is None else Path(path)
    if path is not None and default is not None and not os.path.samefile(default, _existing(Path(path), name)):
        log.warning("%s is not used: the %s is %s", default, name, path)
    if folder is None:
        return None
    here = os.path.realpath(_existing(folder, name))
    for other_name, other in others.items():
        other_folder = os.path.realpath(other)
        if Path(here).is_relative_to(other_folder) or Path(other_folder).is_relative_to(here):
            raise DataError(
                f"the {name} in {folder} and the {other_name} images in {other} share files: give folders of which "
                "none holds the other"
            )
    others[name] = folder
    return folder


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        setting = "target_path" if name == "target" else "test_path"
        raise DataError(f"{folder} is no folder: name the folder of the {name} (--task.{setting})")
    return folder
