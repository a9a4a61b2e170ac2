"""Loaders of the usual image data sets. Only `load_hub`, and the others with `download`, may use the network."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cads.errors import ConfigError, DataError
from cads.runtime.signals import Interrupted
from cads.tasks.vision.images import ImageArrays, ImageData, ImageFiles, Images, ImageTensors

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


def load_image_folder(root: str | Path, size: int | None = None) -> ImageData:
    """A tree of image files: class/file, or source/class/file; under train/ and test/ if there is a train/.

    Args:
        root: its folder.
        size: as for `ImageFiles`.

    Raises:
        DataError: if there is no such folder, no image, or the levels are mixed.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is no folder: name the folder of the images (--task.path)")
    split = (root / "train").is_dir()
    files = _image_paths(root / "train" if split else root)
    classes = tuple(sorted({f.parent.name for f in files}))
    train = _folder_payload(files, classes, size)
    test = None
    if split and (root / "test").is_dir():
        test = _folder_payload(_image_paths(root / "test"), classes, size).reshaped(train.shape)
    if len(files[0].relative_to(root).parts) - split == 2:
        return ImageData(train, test, classes)
    names, sources = np.unique([f.parent.parent.name for f in files], return_inverse=True)
    return ImageData(train, test, classes, sources, tuple(names.tolist()))


def _image_paths(root: Path) -> list[Path]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files = sorted(
        Path(folder) / name
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    )
    if not files:
        raise DataError(f"{root} holds no image: name a folder of class/file or source/class/file")
    by_depth = {len(f.relative_to(root).parts): f for f in files}
    if len(by_depth) > 1 or not by_depth.keys() <= {2, 3}:
        examples = ", ".join(str(f.relative_to(root)) for f in by_depth.values())
        raise DataError(f"{root} must hold class/file or source/class/file throughout, and has {examples}")
    return files


def _folder_payload(files: list[Path], classes: tuple[str, ...], size: int | None) -> ImageFiles:
    codes = {name: code for code, name in enumerate(classes)}
    unknown = next((f for f in files if f.parent.name not in codes), None)
    if unknown is not None:
        raise DataError(f"{unknown}: the class {unknown.parent.name!r} is not among the training images")
    return ImageFiles([(f,) for f in files], 0, [codes[f.parent.name] for f in files], size)


def load_arrays(root: str | Path, size: int | None = None) -> ImageData:
    """Images in `.npy` files, mapped into memory: images.npy, labels.npy and, if there are any, sources.npy.

    They lie in `root`, or in root/train and root/test. Images are uint8 of shape (N, H, W), (N, H, W, C) or
    (N, C, H, W); labels and sources are whole numbers from 0, shape (N,), which are also their names.

    Args:
        root: the folder. size: as for `ImageArrays`.

    Raises:
        DataError: if a file is missing, damaged, or of another kind.
    """
    root = Path(root)
    split = (root / "train").is_dir()
    train, n_classes = _array_split(root / "train" if split else root, size)
    test = None
    if split and (root / "test").is_dir():
        test, n_test_classes = _array_split(root / "test", size)
        if test.shape != train.shape or n_test_classes > n_classes:
            raise DataError(
                f"{root / 'test'} has images of shape {test.shape} and {n_test_classes} classes, where the training "
                f"split has {train.shape} and {n_classes}: give the same kind"
            )
    classes = _numbered(n_classes)
    sources_path = (root / "train" if split else root) / "sources.npy"
    if not sources_path.is_file():
        return ImageData(train, test, classes)
    names, sources = np.unique(_whole_numbers(sources_path, len(train)), return_inverse=True)
    return ImageData(train, test, classes, sources, tuple(str(name) for name in names))


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
) -> ImageData:
    """Any image data set that `datasets` can load: split "train", and "test" if there is one.

    It stays on disk: images are decoded, or copied from the mapped file, when a batch needs them.

    Args:
        name: a name on the Hugging Face hub, a local folder, or a folder written by `save_to_disk`.
        image_column: holds the images: feature `datasets.Image`, or `Array2D` or `Array3D` of uint8.
        label_column: class names, class labels, or integers from 0.
        source_column: of the training split: where each image comes from; None: no sources.
        size: as for `ImageFiles`.

    Raises:
        ConfigError: if a column is missing or of the wrong kind.
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
    labels, classes = _codes(splits["train"], label_column, "label_column")
    train = _hub_payload(splits["train"], image_column, labels, size)
    test = None
    if "test" in splits:
        labels, _ = _codes(splits["test"], label_column, "label_column", classes)
        test = _hub_payload(splits["test"], image_column, labels, size)
        if isinstance(test, ImageFiles):
            test = test.reshaped(train.shape)
        elif test.shape != train.shape:
            raise DataError(f"the test split has images of shape {test.shape}, the training split of {train.shape}")
    if source_column is None:
        return ImageData(train, test, classes)
    sources, names = _codes(splits["train"], source_column, "source_column")
    return ImageData(train, test, classes, sources, names)


def _hub_payload(split: Any, column: str, labels: np.ndarray, size: int | None) -> Images:
    import datasets

    feature = _feature(split, column, "image_column")
    if isinstance(feature, datasets.Array2D | datasets.Array3D) and feature.dtype == "uint8":
        return _arrow_images(split, column, feature.shape, labels, size)
    if not isinstance(feature, datasets.Image):
        raise ConfigError(f"image_column = {column!r} holds {split.features[column]}: name a column of images")
    return ImageFiles(split.select_columns([column]), column, labels, size)


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
