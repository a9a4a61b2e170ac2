"""What files and folders are: texts or images, and which of them are pool, target and test set."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cads.cli.data_flags import near_name
from cads.errors import ConfigError, DataError
from cads.tasks.language.tables import COMPRESSIONS, SUFFIXES
from cads.tasks.vision.folders import DEEPEST, EXTENSIONS, TARGET, TEST, is_hidden, some

ROLES = {"target": TARGET, "test": TEST}
"""Words in the name of a file, or of a folder in a folder, by which it is target or test set."""
SAVED = ("state.json", "dataset_dict.json")
"""Files by which a folder is one of `datasets`."""
MODEL = ("model.safetensors", "tokenizer_config.json", "adapter_config.json")
RUN = ("selection.json", "results.json")
"""Files by which a folder is one of a model, or of a run of cads."""
BESIDE_DATA = ("dataset_info.json", *SAVED)
"""Files that describe data and hold none."""


@dataclass
class Inputs:
    """Files and folders by what they are.

    Attributes:
        texts: files of texts (and folders of `datasets`) of pool, target and test set, by these names.
        images: folders of images, or of `datasets` with images, of the same.
        said: what was guessed, and what is not used.
    """

    texts: dict[str, list[str]] = field(default_factory=lambda: {"pool": [], "target": [], "test": []})
    images: dict[str, list[str]] = field(default_factory=lambda: {"pool": [], "target": [], "test": []})
    said: list[str] = field(default_factory=list)


def recognise(paths: Sequence[str], target: str | None = None, test: str | None = None) -> Inputs:
    """Sort files and folders into texts and images, and into pool, target and test set.

    Files of a folder count one by one. Names that say so (`val.jsonl`, `test/`) are target and test set, unless these
    are given.

    Raises:
        ConfigError: if texts and images are mixed, several folders of images are given, or a path does not exist.
        DataError: if a file or folder holds nothing that can be read.
    """
    inputs = Inputs()
    given = {"target": target, "test": test}
    for path in paths:
        for found, names in _contents(path, inputs):
            role = _role(names)
            if role is not None and given[role] is not None:
                if os.path.realpath(found) != os.path.realpath(str(given[role])):
                    inputs.said.append(f"{found} is not used: the {_said(role)} is {given[role]}")
                continue
            inputs.texts[role or "pool"].append(found)
    for role, value in given.items():
        if value is not None:
            inputs.texts[role] += [found for found, _ in _contents(value, inputs, role)]
    texts, images = (any(parts.values()) for parts in (inputs.texts, inputs.images))
    if texts and images:
        raise ConfigError("some paths are texts and some are folders of images: give one kind")
    if len(inputs.images["pool"]) > 1:
        raise ConfigError(
            f"{inputs.images['pool']} are {len(inputs.images['pool'])} folders of images: put them into one, and each "
            "is a source of the pool"
        )
    if texts and not inputs.texts["pool"]:
        held_out = next(part for part in ("target", "test") if inputs.texts[part])
        raise ConfigError(
            f"{some(inputs.texts[held_out])} is by name the {_said(held_out)}, and nothing is left for the pool: give "
            "the files of the pool too, or rename this one"
        )
    _check_once(inputs)
    for role in ROLES:
        if texts and given[role] is None and inputs.texts[role]:
            inputs.said.append(f"by name the {_said(role)}: {some(inputs.texts[role])} (--{role} names another)")
    return inputs


def _check_once(inputs: Inputs) -> None:
    """Refuse a file or folder that is given twice."""
    for parts in (inputs.texts, inputs.images):
        places: dict[str, str] = {}
        for role, paths in parts.items():
            for path in paths:
                earlier = places.setdefault(os.path.realpath(path), role)
                if earlier != role or paths.count(path) > 1:
                    words = f"{_said(earlier)} and {_said(role)}" if earlier != role else f"the {_said(role)} twice"
                    raise ConfigError(f"{path} is {words}: give each file once; what is held out is not trained on")


def _contents(path: str, inputs: Inputs, role: str = "pool") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each file of texts that is or lies below `path`, and the names that tell its role; images go to `inputs`."""
    place = Path(path)
    if not place.exists():
        raise ConfigError(f"{path}: no such file or folder{near_name(place)}")
    if place.is_file():
        if not _is_text(place.name):
            raise DataError(_unreadable(place))
        yield path, (place.name,)
    elif any((place / name).is_file() for name in SAVED):
        yield from _saved(path, inputs, role)
    else:
        yield from _folder(path, inputs, role)


def _saved(path: str, inputs: Inputs, role: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A folder of `datasets`: with images, one of texts, or one folder of texts for each split."""
    from datasets import Dataset, load_from_disk

    try:
        loaded = load_from_disk(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no folder of `datasets` that can be loaded: {error}") from error
    splits = {"": loaded} if isinstance(loaded, Dataset) else dict(loaded)
    if any(image_column(split.features) is not None for split in splits.values()):
        inputs.images[role].append(path)
        return
    for name in splits:
        yield os.path.join(path, name) if name else path, (name,)


def image_column(features: object) -> str | None:
    """The first column of images among the features of a data set; None if there is none."""
    from datasets import Array2D, Array3D, Image

    items = features.items() if isinstance(features, dict) else ()
    return next((name for name, kind in items if isinstance(kind, Image | Array2D | Array3D)), None)


def _folder(path: str, inputs: Inputs, role: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A folder of images, or of files of texts."""
    texts: list[tuple[str, ...]] = []
    products: list[str] = []
    others: list[str] = []
    n_images = 0
    for folder, below, names in os.walk(path, followlinks=True):
        relative = os.path.relpath(folder, path)
        parts = () if relative == os.curdir else tuple(relative.split(os.sep))
        if parts and {*MODEL, *RUN} & set(names):
            products.append(relative)
            below[:] = []
            continue
        below[:] = sorted(name for name in below if not is_hidden(name)) if len(parts) < DEEPEST else []
        for name in sorted(name for name in names if not (is_hidden(name) or name in BESIDE_DATA)):
            if name.lower().endswith(EXTENSIONS):
                n_images += 1
            elif _is_text(name):
                texts.append((*parts, name))
            else:
                others.append(os.path.join(*parts, name))
    if products:
        inputs.said.append(f"{path}: not used are folders of models and of runs: {some(products)}")
    if n_images >= max(1, len(texts)):
        if texts:
            inputs.said.append(f"{path} holds images; not used: {some([os.path.join(*parts) for parts in texts])}")
        inputs.images[role].append(path)
        return
    if not texts:
        held = f" (it holds {some(others)})" if others else ""
        raise DataError(
            f"{path} holds nothing that can be read{held}: give a folder of images (class/file or source/class/file), "
            f"or files of texts ({', '.join(SUFFIXES)})"
        )
    if n_images or others:
        unread = [*others, *([f"{n_images} images"] if n_images else [])]
        inputs.said.append(f"{path} holds texts; not used: {some(unread)}")
    for parts in texts:
        yield os.path.join(path, *parts), parts


def _role(names: Sequence[str]) -> str | None:
    """Target or test set, by the words in the name of a file, or by the name of a folder that it is in."""
    *folders, file = (name.casefold() for name in names)
    words = {*folders, *re.split(r"[^a-z]+", file.split(".")[0])}
    return next((role for role, known in ROLES.items() if words & set(known)), None)


def _is_text(name: str) -> bool:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in SUFFIXES


def _said(role: str) -> str:
    return "test set" if role == "test" else role


def _unreadable(path: Path) -> str:
    if path.name.lower().endswith(EXTENSIONS):
        return f"{path} is a single image: give the folder that holds class/file"
    return f"{path} has the suffix {path.suffix!r}: texts are read from {', '.join(SUFFIXES)}, one row an example"
