"""Images in mapped arrays: the same pool as in memory, and nothing of it is in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.errors import ConfigError, DataError
from cads.recipe import TrainConfig
from cads.selectors.online.selector import Cads
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.datasets import load_arrays, load_hub
from cads.tasks.vision.images import ImageArrays, ImageTensors

RNG = np.random.default_rng(0)


def pictures(n=40, shape=(6, 6)):
    return RNG.integers(0, 256, (n, *shape), dtype=np.uint8), RNG.integers(0, 3, n)


def write(folder, images, labels, **more):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in {"images": images, "labels": labels, **more}.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def in_memory(images, labels):
    return ImageTensors(torch.from_numpy(images).reshape(len(images), 1, *images.shape[1:]), torch.from_numpy(labels))


def saved(folder, images, labels, split=None):
    feature = datasets.Array2D(shape=images.shape[1:], dtype="uint8")
    features = datasets.Features({"image": feature, "label": datasets.Value("int64"), "from": datasets.Value("string")})
    rows = {"image": images, "label": labels, "from": ["ab"[i % 2] for i in labels]}
    made = datasets.Dataset.from_dict(rows, features=features)
    if split is not None:
        made = made.select(split)
    made.save_to_disk(str(folder), num_shards=3)
    return folder


@pytest.mark.parametrize("cuts", [[], [1], [5, 6, 30]])
def test_arrays_are_read_like_tensors(cuts):
    images, labels = pictures()
    arrays, tensors = ImageArrays(np.split(images, cuts), labels), in_memory(images, labels)
    assert arrays.shape == tensors.shape == (1, 6, 6)
    assert arrays.digests() == tensors.digests()
    assert arrays.label_digest() == tensors.label_digest()
    order = np.array([39, 0, 5, 5, 6, 29, 1])
    for one, other in ((arrays, tensors), (arrays.take(order), tensors.take(order))):
        where = np.array([3, 0, 6, 6])
        assert torch.equal(one.pixels(where), other.pixels(where))
        assert torch.equal(one.batch(where).labels, other.batch(where).labels)
    assert arrays.take(order).digests() == tensors.take(order).digests()
    assert torch.equal(arrays.take(order).take(np.array([2, 1])).pixels(np.arange(2)), tensors.pixels(order[[2, 1]]))
    assert arrays.relabel(arrays.labels + 1).digests() == tensors.digests()
    assert len(arrays.pixels(np.array([], dtype=np.int64))) == 0


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((4, 5, 3), (0, 3, 1, 2), (3, 4, 5)),
        ((3, 4, 5), (0, 1, 2, 3), (3, 4, 5)),
        ((4, 5, 1), (0, 3, 1, 2), (1, 4, 5)),
        ((3, 4, 3), (0, 3, 1, 2), (3, 3, 4)),
    ],
)
def test_channels_are_first_or_last(shape, axes, expected):
    images, labels = pictures(7, shape)
    arrays = ImageArrays([images], labels)
    assert arrays.shape == expected
    assert torch.equal(arrays.pixels(np.arange(7)), torch.from_numpy(images.transpose(axes)))


def test_they_are_scaled_as_they_are_read():
    images, labels = pictures()
    scaled = ImageArrays([images], labels, size=4)
    assert scaled.shape == (1, 4, 4)
    where = np.array([7, 2])
    assert torch.equal(scaled.pixels(where), in_memory(images, labels).resize(4).pixels(where))


@pytest.mark.parametrize(
    ("arrays", "labels", "message"),
    [
        ([], np.zeros(0), "no images"),
        ([np.zeros((2, 4, 4))], np.zeros(2), "uint8"),
        ([np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 5), np.uint8)], np.zeros(4), "one shape"),
        ([np.zeros((2, 4, 4, 2), np.uint8)], np.zeros(2), "C = 1 or 3"),
        ([np.zeros((2, 4), np.uint8)], np.zeros(2), "C = 1 or 3"),
        ([np.zeros((2, 0, 4), np.uint8)], np.zeros(2), "no pixels"),
        ([np.zeros((2, 4, 4), np.uint8)], np.zeros(3), "one each"),
    ],
)
def test_arrays_of_the_wrong_kind_are_refused(arrays, labels, message):
    with pytest.raises(DataError, match=message):
        ImageArrays(arrays, labels)


def test_a_folder_of_arrays_is_mapped(tmp_path):
    images, labels = pictures()
    data = load_arrays(write(tmp_path / "a", images, labels, sources=np.arange(40) % 2 + 4))
    assert isinstance(data.train._arrays[0], np.memmap)
    assert data.train.digests() == in_memory(images, labels).digests()
    assert data.classes == ("0", "1", "2")
    assert data.source_names == ("4", "5")
    assert data.test is None
    write(tmp_path / "b" / "train", images, labels)
    write(tmp_path / "b" / "test", images[:5], labels[:5])
    assert len(load_arrays(tmp_path / "b").test) == 5


def npy(header: str) -> bytes:
    """A file with this header, and some bytes."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "((((",
        "{'descr': ('|u1'",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 4, 4)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4611686018427387904, 4611686018427387904, 4)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999999, 1, 1)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 0, 4)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 4, 4)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-2, 4, 4)}",
        "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (2, 4, 4)}",
    ],
)
def test_headers_of_strangers_are_refused(tmp_path, header):
    folder = write(tmp_path / "a", *pictures(2, (4, 4)))
    (folder / "images.npy").write_bytes(npy(header))
    with pytest.raises(DataError, match=r"(images|labels)\.npy"):
        load_arrays(folder)


def test_a_label_does_not_make_a_name_for_each_number_below_it(tmp_path):
    images, labels = pictures()
    labels[7] = 10**15
    with pytest.raises(DataError, match=r"labels\.npy holds 1000000000000000"):
        load_arrays(write(tmp_path / "a", images, labels))
    with pytest.raises(DataError, match="label_column = 'label' holds 0 to 1000000000000000"):
        load_hub(str(saved(tmp_path / "d", images, labels)))
    with pytest.raises(DataError, match="holds -5 to"):
        load_hub(str(saved(tmp_path / "e", images, np.minimum(labels, 3) - 5)))


def test_a_saved_data_set_without_rows_is_named(tmp_path):
    images, labels = pictures()
    with pytest.raises(DataError, match="has no rows"):
        load_hub(str(saved(tmp_path / "d", images, labels, [])))


def test_bad_folders_are_named(tmp_path):
    images, labels = pictures()
    with pytest.raises(DataError, match=r"images\.npy does not exist"):
        load_arrays(tmp_path)
    for more, message in (
        ({"labels": labels[:3]}, r"labels\.npy holds int64 of shape \(3,\)"),
        ({"labels": labels - 5}, "whole numbers from 0"),
        ({"labels": labels / 2}, "whole number for each"),
        ({"images": images.astype(float)}, r"images\.npy.*uint8"),
        ({"images": np.array([object()])}, r"images\.npy cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            load_arrays(write(tmp_path / "bad", **{"images": images, "labels": labels, **more}))
    folder = write(tmp_path / "cut", images, labels)
    (folder / "images.npy").write_bytes((folder / "images.npy").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"images\.npy cannot be read"):
        load_arrays(folder)
    (folder / "images.npy").write_bytes(b"none")
    with pytest.raises(DataError, match=r"images\.npy cannot be read"):
        load_arrays(folder)
    write(tmp_path / "two" / "train", images, labels)
    write(tmp_path / "two" / "test", images[:, :5], labels)
    with pytest.raises(DataError, match="give the same kind"):
        load_arrays(tmp_path / "two")
    with pytest.raises(ConfigError, match="needs a path"):
        VisionConfig(dataset="arrays")


@pytest.mark.parametrize("chosen", [None, [3, 3, 39, 0, 7, 8]])
def test_arrays_in_a_saved_data_set_stay_where_they_are(tmp_path, chosen):
    images, labels = pictures()
    data = load_hub(str(saved(tmp_path / "d", images, labels, chosen)), source_column="from")
    rows = np.arange(40) if chosen is None else np.array(chosen)
    assert isinstance(data.train, ImageArrays)
    assert data.train.digests() == in_memory(images[rows], labels[rows]).digests()
    assert data.train.labels.tolist() == labels[rows].tolist()
    assert [data.source_names[c] for c in data.sources] == ["ab"[i % 2] for i in labels[rows]]


def test_an_index_into_a_data_set_is_followed(tmp_path, monkeypatch):
    images, labels = pictures()
    folder = saved(tmp_path / "d", images, labels)
    shuffled = datasets.load_from_disk(str(folder)).shuffle(seed=1)
    assert shuffled._indices is not None
    monkeypatch.setattr(datasets, "load_from_disk", lambda name: shuffled)
    data = load_hub(str(folder))
    order = shuffled._indices.column(0).to_numpy()
    assert data.train.digests() == in_memory(images[order], labels[order]).digests()
    assert data.train.labels.tolist() == labels[order].tolist()


def test_a_config_selects_from_either(tmp_path):
    images, labels = pictures(300)
    write(tmp_path / "a", images, labels)
    saved(tmp_path / "d", images, labels)
    chosen = []
    for dataset, folder in (("arrays", "a"), ("hub", "d")):
        text = f"{{dataset: {dataset}, path: {tmp_path / folder}, n_target: 40, n_test: 20, n_pool: 200, hidden: 8}}"
        task = VisionConfig(**yaml.safe_load(text)).build(TrainConfig(batch_size=16))
        task.check()
        assert isinstance(task.pool.examples, ImageArrays)
        chosen.append(Cads().select(task, Budget(3, "epochs"), seed=0, ledger=Ledger()))
    assert (chosen[0].score == chosen[1].score).all()
    assert (chosen[0].selected == chosen[1].selected).all()


READS_ALL = """
import re, sys
from pathlib import Path

from cads.recipe import TrainConfig
from cads.tasks.vision.config import VisionConfig


def anonymous_memory():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def read(folder):
    before = anonymous_memory()
    task = VisionConfig(dataset="arrays", path=folder, n_target=50, n_test=50).build(TrainConfig(batch_size=32))
    _ = task.pool.content_hash
    for batch in task.pool.batches(512):
        assert len(batch)
    return anonymous_memory() - before


small, large = sys.argv[1:]
read(small)  # the first task imports what all of them need
print(read(large))
"""
"""Prints the bytes, but for mapped files, that a pool takes which is read from its first to its last image."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_large_pool_is_not_loaded(tmp_path):
    """In a process of its own: what others have left to the allocator does not count."""
    n, side = 40_000, 64
    for n_images in (1_000, n):
        folder = tmp_path / str(n_images)
        folder.mkdir()
        images = np.lib.format.open_memmap(
            folder / "images.npy", mode="w+", dtype=np.uint8, shape=(n_images, side, side, 1)
        )
        images[:, 0, 0, 0] = np.arange(n_images) % 251
        images.flush()
        np.save(folder / "labels.npy", np.arange(n_images) % 3)
    folders = [str(tmp_path / str(n_images)) for n_images in (1_000, n)]
    printed = subprocess.run([sys.executable, "-c", READS_ALL, *folders], capture_output=True, text=True, check=True)
    assert int(printed.stdout.split()[-1]) < n * side * side / 2
