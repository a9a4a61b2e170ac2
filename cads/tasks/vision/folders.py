"""Trees of image files: their splits, sources and classes, from the names of their folders."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from cads.errors import DataError

log = logging.getLogger(__name__)

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif"),
    *(".pbm", ".pgm", ".ppm", ".pnm", ".tga", ".jp2", ".avif"),
)
"""Ends of the names of image files, in any case."""
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""Folders that systems make beside data. They and all whose name begins with a dot are hidden: they hold no data."""

TRAIN = ("train", "training")
TARGET = ("val", "validation", "valid", "dev")
TEST = ("test", "testing")
HELD_OUT = ("val", "validation", "test")
"""Names that no class or source in a folder without train/ is likely to have."""

LEVELS = (2, 3)
"""Names in the path of an image: class/file, and source/class/file."""
DEEPEST = 5
"""Levels of folders that are searched; images below the third are not used. A link to a folder above it has no end."""
NAMED = 3
"""Examples in a message."""


@dataclass(frozen=True)
class Splits:
    """The folders of training images, target and test set; None for those that are not there."""

    train: Path
    target: Path | None = None
    test: Path | None = None


@dataclass(frozen=True)
class Tree:
    """The images below a folder.

    Attributes:
        root: the folder.
        files: paths of the images relative to it, as the names of their folders and their own, in ascending order.
        folders: the visible folders below it, in the same form.
        astray: images that are in no folder of a class, such as those at another level, if they may be left out.
    """

    root: Path
    files: list[tuple[str, ...]]
    folders: list[tuple[str, ...]]
    astray: list[tuple[str, ...]]

    @property
    def depth(self) -> int:
        """2 for class/file, 3 for source/class/file."""
        return len(self.files[0])

    @property
    def classes(self) -> list[str]:
        """The classes that have images, in ascending order."""
        return sorted({parts[-2] for parts in self.files})

    def empty(self) -> tuple[list[str], list[str]]:
        """Folders of classes, and of sources, that hold no image."""
        level = self.depth - 1
        classes = {parts[-1] for parts in self.folders if len(parts) == level} - {parts[-2] for parts in self.files}
        if self.depth == 2:
            return sorted(classes), []
        sources = {parts[0] for parts in self.folders if len(parts) == 1} - {parts[0] for parts in self.files}
        return sorted(classes), sorted(sources)

    def path(self, parts: tuple[str, ...]) -> str:
        """The path of one of the files."""
        return os.path.join(self.root, *parts)

    def ids(self, files: Sequence[tuple[str, ...]], root: Path) -> list[str]:
        """The names of files relative to `root`, with slashes; `..` leads to those that are not below it."""
        try:
            prefix = Path(os.path.relpath(self.root, root)).as_posix()
        except ValueError:  # Windows has no way from one drive to another.
            prefix = self.root.as_posix()
        return ["/".join(parts if prefix == "." else (prefix, *parts)) for parts in files]


def splits_of(root: Path, given: Sequence[Path] = ()) -> Splits:
    """The splits in a folder: train/, and beside it val/ or validation/, and test/; or the folder itself.

    The names may be in any case. train/ that holds images and no folders is a class if other classes are beside it.

    Args:
        root: the folder.
        given: folders that are used besides.

    Raises:
        DataError: if there is no such folder, several are the same split, or held-out images are not beside train/.
    """
    visible = [name for name in _listed(root) if not is_hidden(name) and (root / name).is_dir()]
    train = _only(root, visible, TRAIN)
    if train is None or not _has_folders(root / train):
        _refuse_lone_splits(root, visible)
        return Splits(root)
    target, test = _only(root, visible, TARGET), _only(root, visible, TEST)
    used = [os.path.realpath(path) for path in given]
    others = sorted(set(visible) - {train, target, test})
    unused = [name for name in others if os.path.realpath(root / name) not in used]
    unused += [name for name in _listed(root) if name.lower().endswith(EXTENSIONS) and not is_hidden(name)]
    if unused:
        log.warning("%s: not used, beside %s: %s", root, train, some(unused))
    return Splits(root / train, None if target is None else root / target, None if test is None else root / test)


def name_unused_neighbours(root: Path, given: Sequence[Path]) -> None:
    """Name the splits beside a folder of training images that was named itself, unless they are `given` too."""
    here = Path(os.path.abspath(root))
    if here.name.casefold() not in TRAIN:
        return
    used = [os.path.realpath(path) for path in given]
    siblings = [name for name in (*TARGET, *TEST) if (here.parent / name).is_dir()]
    unused = [name for name in siblings if os.path.realpath(here.parent / name) not in used]
    if unused:
        log.warning("%s beside %s are not used: to use them, name %s as the path", unused, root, here.parent)


def _refuse_lone_splits(root: Path, visible: list[str]) -> None:
    """Refuse splits that would be read as classes or sources."""
    splits = [name for name in visible if name.casefold() in (*TRAIN, *TARGET, *TEST)]
    if splits and splits == visible:
        raise DataError(
            f"{root} holds {splits} and no train/ with folders of classes in it: give class/file in each, or name the "
            "folder of the pool (--task.path), of the target (--task.target_path) and of the test set "
            "(--task.test_path)"
        )
    held_out = [name for name in splits if name.casefold() in HELD_OUT and _has_folders(root / name)]
    if held_out:
        raise DataError(
            f"{root} holds {held_out} beside sources and no train/, so that held-out images would be in the pool: move "
            "the sources into train/, or rename these folders"
        )


def _only(root: Path, names: list[str], of_split: tuple[str, ...]) -> str | None:
    matches = [name for name in names if name.casefold() in of_split]
    if len(matches) > 1 and all(_has_folders(root / name) for name in matches):
        raise DataError(
            f"{root} holds {matches}, which are one split: keep one, or name the paths (--task.target_path)"
        )
    return next((name for name in matches if _has_folders(root / name)), matches[0] if matches else None)


def _has_folders(folder: Path) -> bool:
    return any(not is_hidden(name) and (folder / name).is_dir() for name in _listed(folder))


def _listed(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: name the folder of the images (--task.path)")
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise _forbidden(error) from error


def _forbidden(error: OSError) -> DataError:
    return DataError(f"{error.filename} cannot be read ({error.strerror}): allow it, or remove it")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def read_tree(root: Path, drop: bool) -> Tree:
    """All images below a folder; what is not used is named.

    Args:
        root: the folder, which holds class/file or source/class/file.
        drop: leave out images that are not at the level of most, instead of refusing them.

    Raises:
        DataError: if a folder cannot be read, there is no image, or the levels are mixed.
    """
    images: list[tuple[str, ...]] = []
    folders: list[tuple[str, ...]] = []
    hidden: list[str] = []
    others: list[str] = []

    def refuse(error: OSError) -> None:
        raise _forbidden(error) from error

    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        relative = os.path.relpath(folder, root)
        parts = () if relative == os.curdir else tuple(relative.split(os.sep))
        hidden += [os.path.join(*parts, name) for name in below if is_hidden(name)]
        below[:] = sorted(name for name in below if not is_hidden(name)) if len(parts) < DEEPEST else []
        folders += [(*parts, name) for name in below]
        for name in names:
            if not is_hidden(name):
                is_image = name.lower().endswith(EXTENSIONS)
                images.append((*parts, name)) if is_image else others.append(os.path.join(*parts, name))
    if hidden:
        log.warning("%s: hidden folders are not used: %s", root, some(hidden))
    if others:
        log.warning("%s: files whose names are not those of images are not used: %s", root, some(others))
    if not images:
        raise DataError(f"{root} holds no image: name a folder of class/file or source/class/file")
    images.sort()
    depth = _depth(root, images, drop)
    files = [parts for parts in images if len(parts) == depth]
    astray = [parts for parts in images if len(parts) != depth]
    return Tree(root, files, sorted(folders), astray)


def _depth(root: Path, images: list[tuple[str, ...]], drop: bool) -> int:
    """The level of all images, or with `drop` that of most: 2 for class/file, 3 for source/class/file.

    Raises:
        DataError: if there is none.
    """
    numbers = Counter(map(len, images))
    usable = [(number, depth) for depth, number in numbers.items() if depth in LEVELS]
    if usable and (len(numbers) == 1 or drop):
        n_images, depth = max(usable)
        if [number for number, _ in usable].count(n_images) == 1:
            return depth
    first = {len(parts): os.path.join(*parts) for parts in reversed(images)}
    levels = ", ".join(f"{numbers[depth]} such as {first[depth]}" for depth in sorted(numbers))
    remedy = "move them" if drop or not usable else "move the others, or set drop: true to leave them out"
    raise DataError(f"{root} must hold class/file or source/class/file throughout, and has {levels}: {remedy}")


def some(names: Collection[str]) -> str:
    """The first of these names, and how many more there are."""
    first = ", ".join(sorted(names)[:NAMED])
    return first if len(names) <= NAMED else f"{first} and {len(names) - NAMED} more"
