"""Loaders of the usual image data sets. Only `load_hub`, and the others with `download`, may use the network."""

from __future__ import annotations

import gzip
import logging
import math
import os
import zlib
from dataclasses import replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cads.data.ids import numbered
from cads.errors import ConfigError, DataError
from cads.runtime.signals import Interrupted
from cads.tasks.vision.folders import TARGET
from cads.tasks.vision.image_folder import load_image_folder
from cads.tasks.vision.images import ImageArrays, ImageData, ImageFiles, Images, ImageTensors
from cads.tasks.vision.left_out import LeftOut, first_error

__all__ = ["load_arrays", "load_cifar", "load_digits", "load_fashion_mnist", "load_hub", "load_image_folder"]

log = logging.getLogger(__name__)

SYSTEM_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Folder of the Debian package dataset-fashion-mnist."""

IDX_UINT8 = 0x08
"""Type code of unsigned bytes, third byte of the magic number of an idx file; the fourth is the rank."""

MAX_CLASSES = 2**20
"""Most classes. Numeric labels define as many classes as their largest value, so larger labels are taken for errors."""

FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def cache_folder() -> Path:
    """Folder of downloads unless a path is given: $XDG_CACHE_HOME/cads."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cads"


def load_digits() -> ImageData:
    """The digits of scikit-learn: 1,797 images 8x8, 10 classes, one set; grey levels 0..16 become 0..255.

    Raises:
        DataError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'cads-select[demo]'"
        ) from error
    digits = load()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    train = ImageTensors(images, torch.from_numpy(digits.target))
    return ImageData(train, None, tuple(str(name) for name in digits.target_names))


def load_fashion_mnist(root: str | Path | None = None, download: bool = False) -> ImageData:
    """Fashion-MNIST: 60,000 + 10,000 images 28x28, 10 classes, from its idx files, plain or .gz.

    Args:
        root: folder of the files, or of torchvision's layout (root/FashionMNIST/raw); None: the folder of
            the Debian package, then the cache of cads.
        download: allow torchvision to fetch what is missing, into `root` or the cache.

    Raises:
        DataError: if files are missing, damaged or do not fit together.
    """
    home = Path(root) if root is not None else cache_folder()
    folders = [home, home / "FashionMNIST" / "raw"]
    if root is None:
        folders.insert(0, SYSTEM_FASHION_MNIST)
    folder = next((f for f in folders if _idx_file(f, "train-images-idx3-ubyte")), None)
    if folder is None:
        if not download:
            searched = ", ".join(str(f) for f in folders)
            raise DataError(
                f"Fashion-MNIST is not in {searched}: apt install dataset-fashion-mnist, name the folder of "
                "its idx files (--task.path), or allow the download (--task.download true)"
            )
        _torchvision("FashionMNIST", home, train=True, download=True)
        folder = home / "FashionMNIST" / "raw"
    train, test = _idx_split(folder, "train"), _idx_split(folder, "t10k")
    return ImageData(train, test, FASHION_CLASSES)


def _idx_file(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((f for f in candidates if f.is_file()), None)


def _idx_split(folder: Path, split: str) -> ImageTensors:
    images, labels = (
        _read_idx(folder, f"{split}-{kind}-ubyte", rank) for kind, rank in (("images-idx3", 3), ("labels-idx1", 1))
    )
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images and {len(labels)} labels in {split}-*; fetch the files again")
    return ImageTensors(torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64)))


def _read_idx(folder: Path, name: str, rank: int) -> np.ndarray:
    """One idx file: magic number (0, 0, type, rank), `rank` big-endian sizes, then the bytes."""
    path = _idx_file(folder, name)
    if path is None:
        raise DataError(f"{folder / name}(.gz) is missing: fetch the file again")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; fetch the file again") from error
    start = 4 + 4 * rank
    if len(raw) < start or raw[:4] != bytes((0, 0, IDX_UINT8, rank)):
        raise DataError(f"{path} is no idx file of {rank} dimensions of bytes: fetch the file again")
    sizes = np.frombuffer(raw, ">u4", rank, offset=4).astype(np.int64)
    if len(raw) - start != sizes.prod():
        raise DataError(
            f"{path} promises {' x '.join(map(str, sizes))} bytes and holds {len(raw) - start}: fetch the file again"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes).copy()


def load_cifar(name: str, root: str | Path | None = None, download: bool = False) -> ImageData:
    """CIFAR-10 or CIFAR-100: 50,000 + 10,000 images 32x32 in colour.

    Args:
        name: "cifar10" or "cifar100".
        root: the folder that holds cifar-10-batches-py or cifar-100-python; None: the cache of cads.
        download: allow torchvision to fetch what is missing into it.

    Raises:
        ConfigError: if there is no such data set.
        DataError: if its files are missing or damaged.
    """
    if name not in ("cifar10", "cifar100"):
        raise ConfigError(f"dataset = {name!r}: choose cifar10 or cifar100")
    home = Path(root) if root is not None else cache_folder()
    train, test = (_torchvision(name.upper(), home, train=t, download=download) for t in (True, False))

    def payload(split: Any) -> ImageTensors:
        return ImageTensors(torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets))

    return ImageData(payload(train), payload(test), tuple(train.classes))


def _torchvision(name: str, home: Path, *, train: bool, download: bool) -> Any:
    import torchvision

    try:
        return getattr(torchvision.datasets, name)(str(home), train=train, download=download)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{name} is not in {home}, or damaged ({error}): name the folder that holds it (--task.path), "
            "or allow the download (--task.download true)"
        ) from error


def load_arrays(
    root: str | Path,
    size: int | None = None,
    target: str | Path | None = None,
    test: str | Path | None = None,
) -> ImageData:
    """Images in `.npy` files, mapped into memory: images.npy, labels.npy and, if there are any, sources.npy.

    They lie in `root`, or in root/train and root/test. Images are uint8 of shape (N, H, W), (N, H, W, C) or
    (N, C, H, W); labels and sources are whole numbers from 0, shape (N,), which are also their names.

    Args:
        root: the folder.
        size: as for `ImageArrays`.
        target: folder of the images of the target; None: root/val or root/validation beside root/train, or else it is
            drawn from the training images.
        test: folder of the test images; None: root/test, if it is there.

    Raises:
        DataError: if a file is missing, damaged, or of another kind.
    """
    root = Path(root)
    split = (root / "train").is_dir()
    train, n_classes = _array_split(root / "train" if split else root, size)
    if test is None and split and (root / "test").is_dir():
        test = root / "test"
    if target is None and split:
        tested = None if test is None else os.path.realpath(test)
        siblings = (root / name for name in TARGET if (root / name).is_dir())
        target = next((folder for folder in siblings if os.path.realpath(folder) != tested), None)
    data = ImageData(
        train,
        None if test is None else _held_out_arrays(Path(test), size, train, n_classes),
        _numbered(n_classes),
        target=None if target is None else _held_out_arrays(Path(target), size, train, n_classes),
    )
    sources_path = (root / "train" if split else root) / "sources.npy"
    if not sources_path.is_file():
        return data
    names, sources = np.unique(_whole_numbers(sources_path, len(train)), return_inverse=True)
    return replace(data, sources=sources, source_names=tuple(str(name) for name in names))


def _held_out_arrays(folder: Path, size: int | None, train: ImageArrays, n_classes: int) -> ImageArrays:
    """The images of the target or the test set, which are of the kind of the training images."""
    images, n_held_out_classes = _array_split(folder, size)
    if images.shape != train.shape or n_held_out_classes > n_classes:
        raise DataError(
            f"{folder} has images of shape {images.shape} and {n_held_out_classes} classes, where the training "
            f"split has {train.shape} and {n_classes}: give the same kind"
        )
    return images


def _array_split(folder: Path, size: int | None) -> tuple[ImageArrays, int]:
    """The images of one folder, and the number of their classes."""
    images = _mapped(folder / "images.npy")
    labels = _whole_numbers(folder / "labels.npy", len(images))
    try:
        payload, n_classes = ImageArrays([images], labels, size), int(labels.max()) + 1
    except DataError as error:
        raise DataError(f"{folder / 'images.npy'}: {error}") from error
    if n_classes > MAX_CLASSES:
        raise DataError(f"{folder / 'labels.npy'} holds {n_classes - 1}: number the classes from 0")
    return payload, n_classes


def _numbered(n_classes: int) -> tuple[str, ...]:
    """Names of classes that have none."""
    return tuple(str(i) for i in range(n_classes))


def _mapped(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path} does not exist: name a folder with images.npy and labels.npy (--task.path)")
    try:
        # A damaged header may claim more values than any file holds; NumPy detects this by an overflow.
        with np.errstate(over="ignore"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError, TypeError, TokenError) as error:
        raise DataError(f"{path} cannot be read: {error}; write it with numpy.save") from error
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise DataError(f"{path} is no array: write it with numpy.save")
    return array


def _whole_numbers(path: Path, n: int) -> np.ndarray:
    array = _mapped(path)
    if array.shape != (n,) or array.dtype.kind not in "iu":
        raise DataError(f"{path} holds {array.dtype} of shape {array.shape}: give one whole number for each of {n}")
    numbers = np.array(array, dtype=np.int64)
    if n and numbers.min() < 0:
        raise DataError(f"{path} holds {numbers.min()}: give whole numbers from 0")
    return numbers


def load_hub(
    name: str,
    image_column: str = "image",
    label_column: str = "label",
    source_column: str | None = None,
    size: int | None = None,
    target: str | None = None,
    test: str | None = None,
    *,
    drop: bool = False,
) -> ImageData:
    """Any image data set that `datasets` can load: split "train", and "test" if there is one.

    It stays on disk: images are decoded, or copied from the mapped file, when a batch needs them.

    Args:
        name: a name on the Hugging Face hub, a local folder, or a folder written by `save_to_disk`.
        image_column: holds the images: feature `datasets.Image`, or `Array2D` or `Array3D` of uint8.
        label_column: class names, class labels, or integers from 0.
        source_column: of the training split: where each image comes from; None: no sources.
        size: as for `ImageFiles`.
        target: the split that is the target; None: "val" or "validation", or else it is drawn from the training split.
        test: the split that is the test set; None: "test", if there is one.
        drop: leave out images that cannot be read. This decodes all images once.

    Raises:
        ConfigError: if a column or split is missing, or a column is of the wrong kind.
        DataError: if the data set cannot be loaded, has no training split, or lacks values.
    """
    import datasets

    saved = any((Path(name) / state).is_file() for state in ("state.json", "dataset_dict.json"))
    # The library passes on exceptions of its many back ends. Any of them means that the data cannot be loaded.
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Interrupted:
        raise
    except Exception as error:
        raise DataError(
            f"the data set {name!r} cannot be loaded ({error}): give a local folder (--task.path), or a name "
            "on the hub that can be reached from here"
        ) from error
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    if "train" not in splits:
        raise DataError(f"the data set {name!r} has the splits {sorted(splits)}: it needs one named train")
    test = "test" if test is None and "test" in splits else test
    target = next((s for s in TARGET if s in splits and s != test), None) if target is None else target
    for setting, split in (("target_path", target), ("test_path", test)):
        if split is not None and (split not in splits or split == "train"):
            raise ConfigError(f"{setting} = {split!r}: name another split of {name!r} than train: {sorted(splits)}")
    if target is not None and target == test:
        raise ConfigError(f"target_path = {target!r} is the test set too: name another split of {sorted(splits)}")
    unused = sorted(set(splits) - {"train", target, test})
    if unused:
        log.warning(
            "the splits %s of %s are not used (--task.target_path %s makes one the target)", unused, name, unused[0]
        )
    codes, classes = _codes(splits["train"], label_column, "label_column")
    left_out, columns = LeftOut(drop), (image_column, label_column)
    payload = _hub_payload(splits["train"], image_column, codes, size)
    train, train_ids, readable = _readable(payload, "train", left_out)
    data = ImageData(train, None, classes, train_ids=train_ids)
    if source_column is not None:
        sources, names = _codes(splits["train"], source_column, "source_column")
        data = replace(data, sources=sources if readable is None else sources[readable], source_names=names)
    if target is not None:
        images, ids, _ = _readable(_held_out(splits[target], columns, data, size), "target", left_out)
        data = replace(data, target=images, target_ids=ids)
    if test is not None:
        images, ids, _ = _readable(_held_out(splits[test], columns, data, size), "test", left_out)
        data = replace(data, test=images, test_ids=ids)
    return replace(data, left_out=left_out.report(name))


def _held_out(split: Any, columns: tuple[str, str], data: ImageData, size: int | None) -> Images:
    """The images of the target or test split, of the shape of the training images."""
    labels, _ = _codes(split, columns[1], "label_column", data.classes)
    images = _hub_payload(split, columns[0], labels, size, data.train.shape)
    if images.shape != data.train.shape:
        raise DataError(f"the test split has images of shape {images.shape}, the training split of {data.train.shape}")
    return images


def _readable(images: Images, name: str, left_out: LeftOut) -> tuple[Images, pa.Array | None, np.ndarray | None]:
    """Without the images that cannot be read, if they may be left out: the images, their ids and positions."""
    if not left_out.drop:
        return images, None, None
    images, errors = images.read()
    ids, readable = numbered(name, len(images)), np.delete(np.arange(len(images)), list(errors))
    left_out.add("images that cannot be read", [ids[i].as_py() for i in errors], first_error(errors))
    if not len(readable):
        raise DataError(f"no image of the split {name} can be read{first_error(errors)}: repair the data set")
    return images.take(readable), ids.take(pa.array(readable)), readable


def _hub_payload(
    split: Any, column: str, labels: np.ndarray, size: int | None, shape: tuple[int, int, int] | None = None
) -> Images:
    """The images of a split; `shape`: as for `ImageFiles`."""
    import datasets

    feature = _feature(split, column, "image_column")
    if isinstance(feature, datasets.Array2D | datasets.Array3D) and feature.dtype == "uint8":
        return _arrow_images(split, column, feature.shape, labels, size)
    if not isinstance(feature, datasets.Image):
        raise ConfigError(f"image_column = {column!r} holds {split.features[column]}: name a column of images")
    rows = split.select_columns([column])
    stored = rows.cast_column(column, datasets.Image(decode=False))
    # A feature with a mode gives all images this mode, which is that of the first.
    headers = rows.select([0]) if feature.mode else stored
    if not feature.decode:
        rows = rows.cast_column(column, datasets.Image(mode=feature.mode))
    return ImageFiles(rows, column, labels, size, shape, headers)


def _arrow_images(split: Any, column: str, shape: tuple[int, ...], labels: np.ndarray, size: int | None) -> Images:
    """A column of arrays as it is stored in its file; nothing is copied or read."""
    chunks = []
    for chunk in split.data.column(column).chunks:
        values = chunk.storage
        while not pa.types.is_uint8(values.type):
            values = values.flatten()
        if len(values) != len(chunk) * math.prod(shape):
            raise DataError(f"image_column = {column!r} has images that are missing or not of shape {shape}: fill them")
        chunks.append(values.to_numpy(zero_copy_only=False).reshape(-1, *shape))
    # After `select`, `shuffle` or `train_test_split` the file is unchanged, and there is an index into it.
    if split._indices is None:
        return ImageArrays(chunks, labels, size)
    index = split._indices.column(0).to_numpy()
    all_images = ImageArrays(chunks, np.zeros(sum(map(len, chunks)), dtype=np.int64), size)
    return all_images.take(index).relabel(torch.from_numpy(labels))


def _feature(split: Any, column: str, setting: str) -> Any:
    if column not in split.features:
        raise ConfigError(f"{setting} = {column!r} is no column: choose from {sorted(split.features)}")
    return split.features[column]


def _codes(
    split: Any, column: str, setting: str, names: tuple[str, ...] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The values of a column as codes, and the name of each code; integers are their own codes."""
    import datasets

    feature = _feature(split, column, setting)
    values = split.select_columns([column]).with_format("arrow")[:][column]
    if not len(values):
        raise DataError(f"{setting} = {column!r} has no rows: give at least one example")
    if values.null_count:
        raise DataError(f"{setting} = {column!r} has {values.null_count} missing values: fill them")
    if pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
        codes = values.cast(pa.int64()).to_numpy()
        if isinstance(feature, datasets.ClassLabel):
            return codes, tuple(feature.names)
        if codes.min() < 0 or codes.max() >= MAX_CLASSES:
            raise DataError(f"{setting} = {column!r} holds {codes.min()} to {codes.max()}: number them from 0")
        return codes, names or _numbered(int(codes.max()) + 1)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise ConfigError(f"{setting} = {column!r} holds {feature}: it must hold names or whole numbers")
    present = sorted(values.unique().to_pylist())
    names = names or tuple(present)
    unknown = sorted(set(present) - set(names))
    if unknown:
        raise DataError(f"{setting} = {column!r} has values that the training split lacks: {unknown[:3]}")
    return pc.index_in(values, value_set=pa.array(names, values.type)).to_numpy().astype(np.int64), names
