"""Image classification: from a configuration to a task."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cads.data.ids import numbered
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError
from cads.task import NO_TARGET, TEST_OF_POOL
from cads.tasks.shape_only import Field, ShapeOnly, shape_only_pool
from cads.tasks.vision.augmentation import Augmentation
from cads.tasks.vision.datasets import (
    load_arrays,
    load_cifar,
    load_digits,
    load_fashion_mnist,
    load_hub,
    load_image_folder,
)
from cads.tasks.vision.folders import some
from cads.tasks.vision.images import ImageData, ImageFiles, Images, ImageTensors
from cads.tasks.vision.left_out import first_error
from cads.tasks.vision.networks import Network
from cads.tasks.vision.shapes import DATASET_SIZES, MetaVisionTask
from cads.tasks.vision.synthetic_sources import (
    SyntheticPool,
    SyntheticSource,
    in_numbers,
    make_synthetic_sources,
    source_sizes,
)
from cads.tasks.vision.task import VisionTask, check_labels, images_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from cads.recipe import TrainConfig
    from cads.task import Task

log = logging.getLogger(__name__)

Dataset = Literal["digits", "fashion-mnist", "cifar10", "cifar100", "folder", "arrays", "hub"]
OWN_DATA = ("folder", "arrays", "hub")
"""Those of the user."""

ADDED = ("weights", "transforms")
"""Fields that `result_fields` lists only where they are set, so that older results keep their fields."""
SAMPLED = 2000
"""Images of a part, of many in files, that are decoded to time training."""
SPLIT, TEST, TARGET = 3, 4, 5
"""First words of the seeds that divide the training split, that draw the test set, and that draw the target."""


@dataclass
class VisionConfig:
    """Image classification: images, their sources, and the network."""

    dataset: Dataset = "digits"
    """digits (scikit-learn), fashion-mnist, cifar10, cifar100, folder (image files), arrays (`.npy` files, mapped
    into memory), or hub (`datasets`: a name, or a folder that `save_to_disk` wrote, which stays on disk)."""
    path: str | None = None
    """Folder of the data, or name of a hub data set; null: where it is usually installed or downloaded."""
    target_path: str | None = None
    """Folder of the images of the target (hub: a split); null: val/ or validation/ beside train/, otherwise the target
    is drawn from the training images."""
    test_path: str | None = None
    """Folder of the test images (hub: a split); null: test/ beside train/, otherwise they are drawn."""
    drop: bool = False
    """folder, hub: leave out and count images that cannot be read or, in a folder, are at another level than most, and
    classes without images, rather than refuse them; all images are decoded once when the data is loaded."""
    download: bool = False
    """Allow torchvision to fetch data and pretrained weights that are missing."""
    image_column: str = "image"
    """hub: the column of images."""
    label_column: str = "label"
    """hub: the column of labels."""
    source_column: str | None = None
    """hub: the column that says where an example comes from; null: no given sources."""
    image_size: int | None = None
    """Scale images to this many pixels square; null: as they are (files: all as the first one, upright)."""
    model: str = "mlp"
    """mlp (one hidden layer), cnn (two convolutions), resnet8 (three residual blocks, for small images), or any
    classifier of torchvision, such as resnet18."""
    hidden: int = 128
    """mlp: hidden units."""
    channels: int = 16
    """cnn, resnet8: channels of the first convolution; each later stage has twice as many as the one before."""
    stride: int = 2
    """cnn, resnet8: stride of the first convolution; 4 is several times faster than 2 on 28x28 images, and a little
    worse."""
    pretrained: bool = False
    """torchvision: as weights: DEFAULT."""
    weights: str | None = None
    """What the network starts from: DEFAULT or another name of torchvision's weights, or a file (safetensors, or a
    state dict, read without running code); a head of another size starts fresh. null: from random weights."""
    transforms: list[str | dict[str, Any]] = field(default_factory=list)
    """Random changes of each training image: names of torchvision.transforms.v2, such as RandomHorizontalFlip, or name
    and arguments, such as {name: RandomCrop, size: 28, padding: 3}; size and type of images must stay."""
    n_target: int | None = None
    """Clean examples that selection optimises for; null: all of the target's own images, if there are any, otherwise a
    tenth of the training split."""
    n_test: int | None = None
    """Clean test examples; null: the data set's test split, where there is none a fifth of all."""
    n_pool: int | None = None
    """Examples of the training split for the pool, or to make its sources from; null: all the rest."""
    sources: list[SyntheticSource] = field(default_factory=list)
    """Sources to make from the pool; empty: those that the data has, if any."""
    data_seed: int = 0
    """Of what goes into target, test, pool and sources, and of the label noise."""

    def __post_init__(self) -> None:
        if self.dataset not in get_args(Dataset):
            raise ConfigError(f"dataset = {self.dataset!r}: choose from {list(get_args(Dataset))}")
        if self.dataset in OWN_DATA and not self.path:
            raise ConfigError(f"dataset = {self.dataset!r} needs a path: the folder, or the name on the hub")
        for name in ("image_size", "n_target", "n_test", "n_pool"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: it must be at least 1")
        for name in ("target_path", "test_path"):
            if getattr(self, name) is not None and self.dataset not in OWN_DATA:
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r}: dataset = {self.dataset!r} has its own splits: leave it out, "
                    "or choose folder, arrays or hub"
                )
        if self.data_seed < 0:
            raise ConfigError(f"data_seed = {self.data_seed}: it must be >= 0")
        names = [spec.name for spec in self.sources]
        if len(set(names)) < len(names):
            raise ConfigError(f"sources {names}: each needs its own name")
        self.network()
        Augmentation(self.transforms)

    def result_fields(self) -> dict[str, Any]:
        """The fields on which a result depends, as JSON values; those that are newer, only where they are set."""
        return {name: value for name, value in asdict(self).items() if name not in ADDED or value}

    def build(self, recipe: TrainConfig) -> VisionTask:
        """Load the data, divide it, and make the synthetic sources.

        Raises:
            DataError: if the data is missing, damaged or too small.
        """
        weights = self.network().weights_file
        parts = self._parts(check=True)
        task = VisionTask(
            parts.pool,
            target=parts.target,
            test=parts.test,
            classes=parts.classes,
            build_model=self._builder(parts),
            recipe=recipe,
            truth=parts.truth,
            augmentation=Augmentation(self.transforms) if self.transforms else None,
            weights=None if weights is None else weights.digest,
            name=f"vision/{self.dataset}",
        )
        task.counts = parts.left_out
        return task

    def meta(self, recipe: TrainConfig) -> VisionTask:
        """The task with shapes in place of images and of weights; see `cads.tasks.vision.shapes`."""
        return meta(self, recipe)

    def network(self) -> Network:
        """The architecture of the network."""
        return Network(
            self.model, self.hidden, self.channels, self.stride, self.pretrained, self.download, self.weights
        )

    def _builder(self, parts: _Parts) -> Callable[[], nn.Module]:
        return partial(self.network().build, images_of(parts.target).shape, len(parts.classes))

    def _parts(self, *, check: bool) -> _Parts:
        """Load the data and divide it. With `check` all images in files are decoded once."""
        data = self._load()
        n_classes = len(data.classes)
        positions, ids, target, test = self._divide(data)
        candidates = data.train.take(positions)
        if check:
            candidates = _checked(candidates, ids, "pool")
            target, test = _checked_pool(target), _checked_pool(test)
            if self.dataset in OWN_DATA and data.test is None:
                log.info(TEST_OF_POOL, f"{len(test):,}")
            if self.dataset in OWN_DATA and data.target is None:
                log.info(NO_TARGET, f"{len(target):,}")
            _say_what_was_guessed([candidates, images_of(target), images_of(test)], self.image_size is None)
        truth: SyntheticPool | None = None
        if self.sources:
            check_labels(candidates, n_classes, ids, "pool")
            sources = in_numbers(self.sources, data.classes)
            truth = make_synthetic_sources(candidates, sources, n_classes, self.data_seed)
            pool = _synthetic_pool(truth, ids)
        else:
            pool = _natural_pool(data, candidates, positions, ids)
        return _Parts(pool, target, test, data.classes, truth, data.left_out)

    def _load(self) -> ImageData:
        held_out = (self.target_path, self.test_path)
        if self.dataset == "folder":
            return load_image_folder(str(self.path), self.image_size, *held_out, drop=self.drop)
        if self.dataset == "arrays":
            return load_arrays(str(self.path), self.image_size, *held_out)
        if self.dataset == "hub":
            columns = (self.image_column, self.label_column, self.source_column)
            return load_hub(str(self.path), *columns, self.image_size, *held_out, drop=self.drop)
        if self.dataset == "digits":
            data = load_digits()
        elif self.dataset == "fashion-mnist":
            data = load_fashion_mnist(self.path, self.download)
        else:
            data = load_cifar(self.dataset, self.path, self.download)
        return data if self.image_size is None else _resized(data, self.image_size)

    def _divide(self, data: ImageData) -> tuple[np.ndarray, pa.Array, Pool, Pool]:
        """Positions of the candidates in the training split and their ids; target; test set. All are disjoint."""
        ids = numbered("train", len(data.train)) if data.train_ids is None else data.train_ids
        order = np.random.default_rng((SPLIT, self.data_seed)).permutation(len(data.train))
        n_test, n_target, n_pool = self.sizes(
            len(data.train),
            None if data.test is None else len(data.test),
            None if data.target is None else len(data.target),
        )
        if data.test is None:
            positions, order = np.sort(order[:n_test]), order[n_test:]
            test = Pool(ids.take(pa.array(positions)), data.train.take(positions), name="test set")
        else:
            test = self._split_pool(data.test, data.test_ids, "test", self.n_test, TEST)
        if data.target is None:
            positions, order = np.sort(order[:n_target]), order[n_target:]
            target = Pool(ids.take(pa.array(positions)), data.train.take(positions), name="target")
        else:
            target = self._split_pool(data.target, data.target_ids, "target", self.n_target, TARGET)
        positions = np.sort(order[:n_pool])
        return positions, ids.take(pa.array(positions)), target, test

    def sizes(self, n_train: int, n_test_split: int | None, n_target_split: int | None = None) -> tuple[int, int, int]:
        """Examples of test set, target and pool.

        Args:
            n_train: examples of the training split.
            n_test_split: examples of the test split; None: the test set is drawn from the training split.
            n_target_split: examples of the split that is the target; None: it is drawn from the training split.

        Raises:
            DataError: if the training split is too small.
        """
        if n_test_split is None:
            n_reserved = n_test = n_train // 5 if self.n_test is None else self.n_test
        else:
            n_reserved, n_test = 0, n_test_split if self.n_test is None else self.n_test
        n_left = max(0, n_train - n_reserved)
        if n_target_split is None:
            n_drawn = n_target = max(1, n_left // 10) if self.n_target is None else self.n_target
        else:
            n_drawn, n_target = 0, n_target_split if self.n_target is None else self.n_target
        n_pool = max(1, n_left - n_drawn) if self.n_pool is None else self.n_pool
        if n_drawn + n_pool > n_left:
            raise DataError(
                f"n_target = {n_drawn} and n_pool = {n_pool} are more than the {n_left} examples there "
                f"are ({n_train} for training, less {n_reserved} for the test set): ask for fewer"
            )
        return n_test, n_target, n_pool

    def _split_pool(self, images: Images, ids: pa.Array | None, split: str, n: int | None, word: int) -> Pool:
        """The pool of a split of its own, or of `n` examples of it, drawn from the seed that begins with `word`."""
        positions = np.arange(len(images))
        if n is not None:
            if n > len(images):
                raise DataError(f"n_{split} = {n}: the {split} split has {len(images)} examples; ask for fewer")
            rng = np.random.default_rng((word, self.data_seed))
            positions = np.sort(rng.permutation(len(images))[:n])
        ids = numbered(split, len(images)) if ids is None else ids
        name = "test set" if split == "test" else split
        return Pool(ids.take(pa.array(positions)), images.take(positions), name=name)


@dataclass(frozen=True)
class _Parts:
    """The data of a task."""

    pool: Pool
    target: Pool
    test: Pool
    classes: tuple[str, ...]
    truth: SyntheticPool | None
    left_out: dict[str, Any]


def _checked(images: Images, ids: pa.Array, name: str) -> Images:
    """The images, all of which can be read."""
    images, errors = images.read()
    if errors:
        named = some([ids[i].as_py() for i in errors])
        raise DataError(
            f"{len(errors)} of {len(images)} images of the {name} cannot be read: {named}{first_error(errors)}; repair "
            "or remove them, or set drop: true to leave them out"
        )
    return images


def _checked_pool(pool: Pool) -> Pool:
    return Pool(pool.ids, _checked(images_of(pool), pool.ids, pool.name), name=pool.name)


def _say_what_was_guessed(parts: list[Images], size_is_guessed: bool) -> None:
    """Say that images were scaled to a size that nobody asked for, and that only first frames are used."""
    readings = [part.reading for part in parts if isinstance(part, ImageFiles) and part.reading is not None]
    if not readings:
        return
    sizes, counts = np.unique(np.concatenate([reading.sizes for reading in readings]), axis=0, return_counts=True)
    _, height, width = parts[0].shape
    if size_is_guessed and len(sizes) > 1:
        common = "x".join(map(str, sizes[counts.argmax()]))
        log.warning(
            "the images have %d sizes, most often %s: all are cropped and scaled to %dx%d, the size of the first one "
            "(--task.image_size sets another)",
            *(len(sizes), common, width, height),
        )
    n_animated = sum(int(reading.has_more_frames.sum()) for reading in readings)
    if n_animated:
        log.warning("%d image files have several frames or pages: only the first is used", n_animated)


def _synthetic_pool(truth: SyntheticPool, ids: pa.Array) -> Pool:
    """The pool of synthetic sources; the k-th duplicate of an example has the suffix #k."""
    names, copies = ids.take(pa.array(truth.origins)), pa.array(truth.copies)
    repeated = pc.binary_join_element_wise(names, copies.cast(pa.string()), "#")
    return Pool(pc.if_else(pc.greater(copies, 0), repeated, names), truth.images, truth.sources, truth.names)


def _natural_pool(data: ImageData, images: Images, positions: np.ndarray, ids: pa.Array) -> Pool:
    """The pool of the images at `positions` of the training split, with the sources of the data set, if it has any."""
    if data.sources is None:
        return Pool(ids, images)
    present, codes = np.unique(data.sources[positions], return_inverse=True)
    if len(present) < len(data.source_names):
        drawn = set(present.tolist())
        absent = [s for i, s in enumerate(data.source_names) if i not in drawn]
        log.warning("no example of the sources %s was drawn into the pool: they are left out", absent)
    return Pool(ids, images, codes, [data.source_names[i] for i in present])


def _resized(data: ImageData, size: int) -> ImageData:
    def resized(images: Images) -> Images:
        return images.resize(size) if isinstance(images, ImageTensors) else images

    test = None if data.test is None else resized(data.test)
    return replace(data, train=resized(data.train), test=test)


def meta(config: VisionConfig, recipe: TrainConfig) -> MetaVisionTask:
    """The task of `config` on the meta device, with sources as large as they are if all classes have the same size.

    Only data sets whose sizes are not known beforehand are opened: folders, arrays and hub data sets. Of images in
    files names and headers are read; all of them are decoded only if those that cannot be read are left out.

    Raises:
        DataError: if the data is too small, or such a data set cannot be opened.
    """
    network = replace(config.network(), pretrained=False, weights=None)
    if config.dataset not in DATASET_SIZES:
        parts = config._parts(check=False)
        build = partial(network.build, images_of(parts.pool).shape, len(parts.classes))
        counts = [len(part) for part in (parts.pool, parts.target, parts.test)]
        sample = partial(_sample, config, recipe, counts)
        return MetaVisionTask(parts.pool, parts.target, parts.test, build, recipe, f"vision/{config.dataset}", sample)
    dataset, size = DATASET_SIZES[config.dataset], config.image_size
    shape = dataset.shape if size is None else (dataset.shape[0], size, size)
    n_test, n_target, n_pool = config.sizes(dataset.n_train, dataset.n_test)
    sources = None
    if config.sources:
        class_counts = np.bincount(np.arange(n_pool) % dataset.n_classes, minlength=dataset.n_classes)
        in_classes = in_numbers(config.sources, dataset.classes)
        sizes = source_sizes(in_classes, class_counts, dataset.n_classes)
        sources = {spec.name: int(n) for spec, n in zip(config.sources, sizes, strict=True)}
        n_pool = sum(sources.values())
    image, label = {"images": Field(shape, torch.uint8)}, Field(())
    return MetaVisionTask(
        shape_only_pool("pool", ShapeOnly(n_pool, image, label), sources),
        shape_only_pool("target", ShapeOnly(n_target, image, label)),
        shape_only_pool("test", ShapeOnly(n_test, image, label)),
        partial(network.build, shape, dataset.n_classes),
        recipe,
        f"vision/{config.dataset}",
        partial(_sample, config, recipe, ()),
    )


def _sample(config: VisionConfig, recipe: TrainConfig, sizes: Sequence[int]) -> tuple[Task, float]:
    """The task with random weights, and with `SAMPLED` images of each part at most, if there are more.

    Args:
        sizes: examples of pool, target and test set; () if reading them takes no longer where they are many.

    Returns:
        the task, and how many times as many images all are.
    """
    config = replace(config, pretrained=False)
    if not sizes or max(sizes) <= SAMPLED or config.sources:
        return config.build(recipe), 1.0
    n_pool, n_target, n_test = (min(n, SAMPLED) for n in sizes)
    sample = replace(config, n_pool=n_pool, n_target=n_target, n_test=n_test)
    return sample.build(recipe), sum(sizes) / (n_pool + n_target + n_test)
