"""Payloads of images and the loaders of data sets."""

import builtins
import gzip
import pickle
import signal
import struct

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from cads.errors import ConfigError, DataError
from cads.runtime.signals import Interrupted
from cads.tasks.vision import datasets as datasets_module
from cads.tasks.vision.datasets import load_cifar, load_digits, load_fashion_mnist, load_hub, load_image_folder
from cads.tasks.vision.images import ImageFiles, ImageTensors


def tensors(n=12, shape=(1, 4, 4), seed=0):
    rng = np.random.default_rng(seed)
    return ImageTensors(torch.from_numpy(rng.integers(0, 256, (n, *shape), dtype=np.uint8)), torch.arange(n) % 3)


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def random_image(seed, shape=(6, 6, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(path, array, magic=None):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) if magic is None else magic
    raw = header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_fashion(folder, suffix=".gz"):
    rng = np.random.default_rng(0)
    for split, n in (("train", 7), ("t10k", 3)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", np.arange(n, dtype=np.uint8))


def hub_data(n=6):
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "camera": datasets.Value("string"),
            "number": datasets.Value("int64"),
        }
    )
    rows = {
        "picture": [Image.fromarray(random_image(i)) for i in range(n)],
        "kind": [i % 2 for i in range(n)],
        "camera": ["phone" if i < 2 else "film" for i in range(n)],
        "number": list(range(n)),
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_batch_holds_the_images_at_its_positions():
    images = tensors()
    batch = images.batch(np.array([5, 0, 5]))
    assert batch.inputs["images"].dtype == torch.uint8
    assert torch.equal(batch.inputs["images"], images.images[[5, 0, 5]])
    assert torch.equal(batch.labels, images.labels[[5, 0, 5]])
    assert batch.positions.tolist() == [5, 0, 5]
    assert batch.tokens == batch.answer_tokens == len(batch) == 3


def test_all_images_have_one_shape():
    representatives, codes = tensors().shapes()
    assert representatives.tolist() == [0]
    assert codes.tolist() == [0] * 12


def test_digests_follow_pixels_and_not_labels():
    images = tensors()
    taken = images.take(np.array([3, 3, 1]))
    assert taken.digests() == images.digests().take([3, 3, 1])
    assert images.relabel(images.labels + 1).digests() == images.digests()
    assert len(images.digests().unique()) == len(images)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_tensors_of_the_wrong_kind_are_refused(images, labels):
    with pytest.raises(DataError, match=r"give"):
        ImageTensors(images, labels)


def test_files_are_decoded_like_tensors_in_memory():
    arrays = [random_image(i) for i in range(5)]
    rows = [(Image.fromarray(a), 9) for a in arrays]
    files = ImageFiles(rows, 0, [0, 1, 0, 1, 0])
    memory = ImageTensors(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2), files.labels)
    assert files.shape == memory.shape == (3, 6, 6)
    assert files.digests() == memory.digests()
    order = np.array([4, 1])
    assert files.take(order).digests() == memory.take(order).digests()
    assert torch.equal(files.take(order).batch(np.array([1])).labels, memory.labels[[1]])


def test_files_are_not_opened_before_they_are_asked_for(tmp_path):
    save(random_image(0), tmp_path / "0.png")
    files = ImageFiles([(tmp_path / "0.png",), (tmp_path / "missing.png",)], 0, [0, 1])
    assert len(files.take(np.array([1, 0]))) == 2
    with pytest.raises(DataError, match=r"missing\.png cannot be read"):
        files.batch(np.array([1]))


def test_other_sizes_and_modes_are_brought_to_one_format():
    rows = [(random_image(0, (6, 6)),), (random_image(1, (9, 12, 3)),), (random_image(2, (4, 20, 4)),)]
    assert ImageFiles(rows, 0, [0, 1, 2]).batch(np.arange(3)).shape == (("images", (3, 6, 6)),)
    assert ImageFiles(rows[:1] * 3, 0, [0, 1, 2]).batch(np.arange(3)).shape == (("images", (1, 6, 6)),)
    assert ImageFiles(rows[1:], 0, [0, 1], size=5).batch(np.arange(2)).shape == (("images", (3, 5, 5)),)


@pytest.mark.parametrize("row", [None, np.zeros((4, 4), dtype=np.uint16), np.zeros((4, 4), dtype=np.float32)])
def test_what_is_no_8_bit_image_is_refused(row):
    with pytest.raises(DataError, match=r"image row 0"):
        ImageFiles([(row,)], 0, [0])


def test_digits_keep_their_values():
    data = load_digits()
    assert len(data.train) == 1797
    assert data.test is None
    assert data.train.shape == (1, 8, 8)
    assert len(data.classes) == 10
    pixels = data.train.pixels(np.arange(1797))
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert len(pixels.unique()) == 17


def test_missing_scikit_learn_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"cads-select\[demo\]"):
        load_digits()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("layout", [".", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, suffix, layout):
    write_fashion(tmp_path / layout, suffix)
    data = load_fashion_mnist(tmp_path)
    assert (len(data.train), len(data.test)) == (7, 3)
    assert data.train.shape == (1, 28, 28)
    assert data.train.labels.tolist() == list(range(7))
    expected = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    assert np.array_equal(data.train.pixels(np.arange(7))[:, 0].numpy(), expected)


def test_fashion_mnist_without_a_path_looks_where_packages_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_module, "SYSTEM_FASHION_MNIST", tmp_path / "system")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"apt install dataset-fashion-mnist.*task\.path.*task\.download"):
        load_fashion_mnist()
    write_fashion(tmp_path / "cache/cads/FashionMNIST/raw")
    assert len(load_fashion_mnist().train) == 7
    write_fashion(tmp_path / "system")
    assert len(load_fashion_mnist().train) == 7


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / LABELS).unlink(), rf"{LABELS}.*is missing"),
        (lambda f: write_idx(f / LABELS, np.zeros(5, dtype=np.uint8)), r"7 images and 5 labels"),
        (lambda f: write_idx(f / LABELS, np.zeros((7, 1), dtype=np.uint8)), r"no idx file of 1 dim"),
        (lambda f: write_idx(f / IMAGES, random_image(0, (7, 2, 2)), b"\0\0\x0d\3"), r"no idx file of 3 dim"),
        (lambda f: (f / LABELS).write_bytes((f / LABELS).read_bytes()[:-2]), r"promises 7 bytes and holds 5"),
        (lambda f: (f / LABELS).write_bytes(b""), r"no idx file"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, damage, message):
    write_fashion(tmp_path, "")
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        load_fashion_mnist(tmp_path)


def test_a_truncated_gz_file_is_named(tmp_path):
    write_fashion(tmp_path)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=rf"{IMAGES}\.gz cannot be read"):
        load_fashion_mnist(tmp_path)


def test_cifar_is_read_from_its_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for split, n in (("train", 4), ("test", 2)):
        data = random_image(n, (n, 3 * 32 * 32))
        content = {"data": data, "fine_labels": list(range(n))}
        (folder / split).write_bytes(pickle.dumps(content))
    names = [f"class {i}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    data = load_cifar("cifar100", tmp_path)
    assert (len(data.train), len(data.test), len(data.classes)) == (4, 2, 100)
    expected = random_image(4, (4, 3 * 32 * 32)).reshape(4, 3, 32, 32)
    assert np.array_equal(data.train.pixels(np.arange(4)).numpy(), expected)


def test_missing_cifar_is_named(tmp_path):
    with pytest.raises(DataError, match=r"CIFAR10 is not in .*--task\.path.*--task\.download true"):
        load_cifar("cifar10", tmp_path)
    with pytest.raises(ConfigError, match="cifar10 or cifar100"):
        load_cifar("cifar1000", tmp_path)


def test_a_folder_of_classes(tmp_path):
    for i in range(4):
        save(random_image(i), tmp_path / ("ant" if i < 3 else "bee") / f"{i}.png")
    data = load_image_folder(tmp_path)
    assert data.classes == ("ant", "bee")
    assert data.train.labels.tolist() == [0, 0, 0, 1]
    assert data.test is None
    assert data.sources is None
    assert np.array_equal(data.train.pixels(np.array([2]))[0].permute(1, 2, 0).numpy(), random_image(2))


def test_a_folder_of_sources_of_classes_with_splits(tmp_path):
    for i, place in enumerate(("film/ant", "film/bee", "phone/ant", "phone/ant")):
        save(random_image(i), tmp_path / "train" / place / f"{i}.png")
    save(random_image(9, (8, 8)), tmp_path / "test" / "bee" / "9.png")
    data = load_image_folder(tmp_path)
    assert data.source_names == ("film", "phone")
    assert data.sources.tolist() == [0, 0, 1, 1]
    assert data.train.labels.tolist() == [0, 1, 0, 0]
    assert data.test.labels.tolist() == [1]
    assert data.test.shape == data.train.shape == (3, 6, 6)
    assert load_image_folder(tmp_path, size=4).test.shape == (3, 4, 4)


def test_a_folder_that_is_not_one_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere is no folder"):
        load_image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no image"):
        load_image_folder(tmp_path)
    save(random_image(0), tmp_path / "train/ant/0.png")
    save(random_image(1), tmp_path / "test/wasp/1.png")
    with pytest.raises(DataError, match="class 'wasp' is not among the training images"):
        load_image_folder(tmp_path)
    save(random_image(2), tmp_path / "train/film/ant/2.png")
    with pytest.raises(DataError, match="throughout"):
        load_image_folder(tmp_path)


def test_a_data_set_of_the_hub_saved_on_disk(tmp_path):
    rows = hub_data()
    split = datasets.DatasetDict({"train": rows, "test": rows.select([0, 3])})
    split.save_to_disk(tmp_path / "saved")
    data = load_hub(str(tmp_path / "saved"), "picture", "kind", "camera")
    assert data.classes == ("cat", "dog")
    assert data.source_names == ("film", "phone")
    assert data.sources.tolist() == [1, 1, 0, 0, 0, 0]
    assert data.test.labels.tolist() == [0, 1]
    assert np.array_equal(data.train.pixels(np.array([4]))[0].permute(1, 2, 0).numpy(), random_image(4))


def test_labels_may_be_names_or_numbers(tmp_path):
    hub_data().save_to_disk(tmp_path)
    by_name = load_hub(str(tmp_path), "picture", "camera")
    assert by_name.classes == ("film", "phone")
    assert by_name.train.labels.tolist() == [1, 1, 0, 0, 0, 0]
    by_number = load_hub(str(tmp_path), "picture", "number")
    assert by_number.classes == tuple("012345")
    assert by_number.train.labels.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("image", "kind"), r"image_column = 'image' is no column: choose from \['camera', 'kind'"),
        (("kind", "kind"), r"image_column = 'kind' holds"),
        (("picture", "class"), r"label_column = 'class' is no column"),
        (("picture", "picture"), r"label_column = 'picture' holds"),
        (("picture", "kind", "origin"), r"source_column = 'origin' is no column"),
    ],
)
def test_wrong_columns_are_named(tmp_path, columns, message):
    hub_data().save_to_disk(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_hub(str(tmp_path), *columns)


def test_a_data_set_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere' cannot be loaded"):
        load_hub(str(tmp_path / "nowhere"))
    datasets.DatasetDict({"extra": hub_data()}).save_to_disk(tmp_path / "extra")
    with pytest.raises(DataError, match=r"splits \['extra'\]"):
        load_hub(str(tmp_path / "extra"), "picture", "kind")
    missing = hub_data().remove_columns("camera").add_column("camera", ["a", None, "b", "a", "a", "b"])
    missing.save_to_disk(tmp_path / "missing")
    with pytest.raises(DataError, match=r"label_column = 'camera' has 1 missing"):
        load_hub(str(tmp_path / "missing"), "picture", "camera")


def test_a_signal_while_a_data_set_loads_is_no_fault_of_the_data_set(monkeypatch):
    def stopped(*_, **__):
        raise Interrupted("stopped", signal.SIGTERM)

    monkeypatch.setattr(datasets, "load_dataset", stopped)
    with pytest.raises(Interrupted):
        load_hub("anything")
