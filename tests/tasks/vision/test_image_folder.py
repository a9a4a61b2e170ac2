"""Folders of images: what is a class, what is the target, what is left out, and what is said."""

import json
import logging
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from cads.errors import ConfigError, DataError
from cads.recipe import TrainConfig
from cads.tasks.vision import images as images_module
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.datasets import load_arrays, load_hub, load_image_folder
from cads.tasks.vision.images import ImageFiles
from cads.tasks.vision.synthetic_sources import SyntheticSource

RECIPE = TrainConfig(batch_size=4)


def picture(seed, shape=(6, 6, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def put(folder, *names, shape=(6, 6, 3), seed=0):
    """Write images of different contents."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        number = sum(i * b for i, b in enumerate(str(path).encode(), start=1)) + seed
        Image.fromarray(picture(number, shape)).save(path)


def classes(folder, n=10, names=("ant", "bee")):
    """A folder of classes of n images each."""
    for name in names:
        put(folder, *(f"{name}/{i:02}.png" for i in range(n)))
    return folder


def spoil(path):
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def config(folder, **more):
    return VisionConfig(dataset="folder", path=str(folder), hidden=4, **more)


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING)
    return caplog


def test_hidden_folders_and_files_are_no_data_and_are_named(tmp_path, warned):
    classes(tmp_path)
    put(tmp_path, ".ipynb_checkpoints/00.png", "__MACOSX/00.png", "ant/.ipynb_checkpoints/00.png")
    (tmp_path / "ant" / "._00.png").write_bytes(b"resource fork")
    data = load_image_folder(tmp_path)
    assert data.classes == ("ant", "bee")
    assert len(data.train) == 20
    assert ".ipynb_checkpoints" in warned.text
    assert data.sources is None


def test_a_hidden_folder_above_the_data_hides_nothing(tmp_path):
    assert len(load_image_folder(classes(tmp_path / ".cache" / "data")).train) == 20


def test_files_that_are_no_images_by_name_are_named(tmp_path, warned):
    classes(tmp_path)
    (tmp_path / "ant" / "photo.heic").write_bytes(b"")
    Image.fromarray(picture(0)).save(tmp_path / "ant" / "drawing.gif")
    data = load_image_folder(tmp_path)
    assert len(data.train) == 21
    assert "photo.heic" in warned.text
    assert "drawing.gif" not in warned.text


def test_ids_are_names_of_files_relative_to_the_path(tmp_path):
    classes(tmp_path / "train", 2)
    put(tmp_path, "val/ant/00.png", "test/bee/x.png")
    data = load_image_folder(tmp_path)
    assert data.train_ids.to_pylist() == [f"train/{c}/{i}.png" for c in ("ant", "bee") for i in ("00", "01")]
    assert data.target_ids.to_pylist() == ["val/ant/00.png"]
    assert data.test_ids.to_pylist() == ["test/bee/x.png"]
    alone = load_image_folder(tmp_path / "train", target=tmp_path / "val")
    assert alone.train_ids.to_pylist()[0] == "ant/00.png"
    assert alone.target_ids.to_pylist() == ["../val/ant/00.png"]


def test_ids_and_pixels_belong_together(tmp_path):
    task = config(classes(tmp_path), n_target=2, n_test=3, sources=[SyntheticSource("a", duplicates=2)]).build(RECIPE)
    for pool in (task.pool, task.target, task.test):
        for i, name in enumerate(pool.ids.to_pylist()):
            expected = np.asarray(Image.open(tmp_path / name.split("#")[0]))
            assert np.array_equal(pool.examples.pixels(np.array([i]))[0].permute(1, 2, 0).numpy(), expected)
            assert task.classes[int(pool.examples.labels[i])] == name.split("/")[0]


@pytest.mark.parametrize("name", ["val", "validation", "Validation", "valid"])
def test_a_split_beside_train_is_the_target_and_test_the_test_set(tmp_path, name):
    classes(tmp_path / "train", 10)
    classes(tmp_path / name, 3)
    classes(tmp_path / "test", 2)
    task = config(tmp_path).build(RECIPE)
    assert (len(task.pool), len(task.target), len(task.test)) == (20, 6, 4)
    assert all(i.startswith(f"{name}/") for i in task.target.ids.to_pylist())
    assert all(i.startswith("test/") for i in task.test.ids.to_pylist())
    task.check()
    part = config(tmp_path, n_target=2, n_test=1, n_pool=7).build(RECIPE)
    assert (len(part.pool), len(part.target), len(part.test)) == (7, 2, 1)
    assert set(part.target.ids.to_pylist()) < set(task.target.ids.to_pylist())
    with pytest.raises(DataError, match="n_target = 7: the target split has 6"):
        config(tmp_path, n_target=7).build(RECIPE)


def test_without_a_split_for_it_the_target_is_drawn_from_training_images(tmp_path):
    classes(tmp_path / "train", 10)
    task = config(tmp_path).build(RECIPE)
    assert (len(task.test), len(task.target), len(task.pool)) == (4, 1, 15)
    classes(tmp_path / "val", 3)
    task = config(tmp_path).build(RECIPE)
    assert (len(task.test), len(task.target), len(task.pool)) == (4, 6, 16)


def test_three_paths_can_be_given(tmp_path, warned):
    classes(tmp_path / "a" / "images")
    classes(tmp_path / "b" / "images", 3)
    classes(tmp_path / "c", 2)
    task = config(tmp_path / "a/images", target_path=str(tmp_path / "b/images"), test_path=str(tmp_path / "c")).build(
        RECIPE
    )
    assert (len(task.pool), len(task.target), len(task.test)) == (20, 6, 4)
    task.check()
    ids = [i for pool in (task.pool, task.target, task.test) for i in pool.ids.to_pylist()]
    assert len(set(ids)) == 30
    assert "not used" not in warned.text


def test_a_given_path_wins_and_what_it_replaces_is_named(tmp_path, warned):
    classes(tmp_path / "train")
    classes(tmp_path / "val", 3)
    classes(tmp_path / "mine", 2)
    data = load_image_folder(tmp_path, target=tmp_path / "mine")
    assert len(data.target) == 4
    assert "val is not used" in warned.text


def test_folders_beside_train_and_splits_beside_a_named_train_are_named(tmp_path, warned):
    classes(tmp_path / "train")
    classes(tmp_path / "unlabelled", 1)
    load_image_folder(tmp_path)
    assert "unlabelled" in warned.text
    classes(tmp_path / "val", 2)
    warned.clear()
    assert load_image_folder(tmp_path / "train").target is None
    assert "['val']" in warned.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["val/ant/0.png", "test/ant/1.png"], "no train/"),
        (["train/0.png", "test/1.png"], "no train/"),
        (["film/ant/0.png", "test/ant/1.png"], "held-out images would be in the pool"),
        (["train/ant/0.png", "val/ant/1.png", "validation/ant/2.png"], "one split"),
        (["train/ant/0.png", "Train/ant/2.png"], "one split"),
        (["train/ant/0.png", "test/1.png"], "class/file"),
    ],
)
def test_splits_that_cannot_be_told_apart_are_refused(tmp_path, names, message):
    put(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        load_image_folder(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    data = load_image_folder(classes(tmp_path, 2, ("bus", "car", "train")))
    assert data.classes == ("bus", "car", "train")


@pytest.mark.parametrize("setting", ["target_path", "test_path"])
def test_paths_that_are_none_or_share_files_are_refused(tmp_path, setting):
    classes(tmp_path / "train")
    with pytest.raises(DataError, match=rf"nowhere is no folder.*{setting}"):
        config(tmp_path, **{setting: str(tmp_path / "nowhere")}).build(RECIPE)
    with pytest.raises(DataError, match="share files"):
        config(tmp_path, **{setting: str(tmp_path / "train")}).build(RECIPE)
    with pytest.raises(ConfigError, match=rf"{setting} = 'x': dataset = 'digits' has its own splits"):
        VisionConfig(**{setting: "x"})


def test_an_empty_class_is_named_or_left_out(tmp_path, warned):
    classes(tmp_path)
    (tmp_path / "cow").mkdir()
    with pytest.raises(DataError, match=r"without images.*cow.*drop: true"):
        config(tmp_path).build(RECIPE)
    task = config(tmp_path, drop=True).build(RECIPE)
    assert task.classes == ("ant", "bee")
    assert "cow" in warned.text
    [left_out] = task.counts.values()
    assert left_out == {"number": 1, "names": ["cow"]}


def test_an_empty_source_and_a_class_that_is_empty_in_all_sources_are_named(tmp_path):
    classes(tmp_path / "film")
    classes(tmp_path / "phone", 2, ("ant",))
    (tmp_path / "phone" / "bee").mkdir()
    assert load_image_folder(tmp_path).classes == ("ant", "bee")
    (tmp_path / "phone" / "cow").mkdir()
    with pytest.raises(DataError, match=r"classes without images.*cow"):
        load_image_folder(tmp_path)
    (tmp_path / "phone" / "cow").rmdir()
    (tmp_path / "scan").mkdir()
    with pytest.raises(DataError, match=r"sources without images.*scan"):
        load_image_folder(tmp_path)
    assert load_image_folder(tmp_path, drop=True).source_names == ("film", "phone")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_images_that_cannot_be_read_are_named_or_left_out(tmp_path, split, warned):
    for name in ("train", "val", "test"):
        classes(tmp_path / name, 6)
    spoil(tmp_path / split / "ant" / "02.png")
    (tmp_path / split / "bee" / "04.png").write_bytes(b"")
    with pytest.raises(DataError, match=rf"2 of 12 images.*{split}/ant/02.png.*{split}/bee/04.png.*drop: true"):
        config(tmp_path).build(RECIPE)
    task = config(tmp_path, drop=True).build(RECIPE)
    sizes = dict(zip(("train", "val", "test"), map(len, (task.pool, task.target, task.test)), strict=True))
    assert sizes == {"train": 12, "val": 12, "test": 12} | {split: 10}
    assert task.counts["images that cannot be read"]["names"] == [f"{split}/ant/02.png", f"{split}/bee/04.png"]
    assert "2 images that cannot be read" in warned.text
    task.check()
    json.dumps(task.counts)


def test_what_is_left_out_moves_no_label_and_no_source(tmp_path):
    for source in ("film", "phone"):
        classes(tmp_path / source, 3, ("ant", "bee", "cow"))
    for source in ("film", "phone"):
        for i in range(3):
            spoil(tmp_path / source / "bee" / f"0{i}.png")
    spoil(tmp_path / "film" / "ant" / "00.png")
    data = load_image_folder(tmp_path, drop=True)
    assert data.classes == ("ant", "cow")
    assert len(data.train) == 11
    for i, name in enumerate(data.train_ids.to_pylist()):
        source, class_name, _ = name.split("/")
        assert data.classes[int(data.train.labels[i])] == class_name
        assert data.source_names[data.sources[i]] == source
        expected = np.asarray(Image.open(tmp_path / name))
        assert np.array_equal(data.train.pixels(np.array([i]))[0].permute(1, 2, 0).numpy(), expected)
    assert any("bee" in entry["names"] for entry in data.left_out.values())


def test_images_of_classes_that_training_lacks_and_in_no_class_are_left_out_on_request(tmp_path):
    classes(tmp_path / "train")
    classes(tmp_path / "val", 2, ("ant", "cow"))
    put(tmp_path, "train/preview.png")
    with pytest.raises(DataError, match="throughout"):
        load_image_folder(tmp_path)
    data = load_image_folder(tmp_path, drop=True)
    assert (len(data.train), len(data.target)) == (20, 2)
    names = [name for entry in data.left_out.values() for name in entry["names"]]
    assert sorted(names) == ["train/preview.png", "val/cow/00.png", "val/cow/01.png"]


@pytest.mark.parametrize("shape", ["class/file", "source/class/file"])
@pytest.mark.parametrize("stray", ["ant/deep/x.png", "ant/a/b/x.png", "a/b/c/d/x.png", "x.png"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_at_another_level_is_refused_with_the_remedy_or_left_out(tmp_path, shape, stray, split):
    for name in ("train", "val"):
        for part in ("",) if shape == "class/file" else ("film", "phone"):
            classes(tmp_path / name / part, 3)
    expected = load_image_folder(tmp_path)
    stray = stray if shape == "class/file" or stray != "ant/deep/x.png" else "film/x.png"
    put(tmp_path / split, stray)
    with pytest.raises(DataError, match=rf"throughout.* 1 such as {stray}.*or set drop: true"):
        load_image_folder(tmp_path)
    data = load_image_folder(tmp_path, drop=True)
    assert data.left_out["images in no folder of a class"] == {"number": 1, "names": [f"{split}/{stray}"]}
    assert data.train_ids == expected.train_ids
    assert data.target_ids == expected.target_ids
    assert data.classes == expected.classes
    assert data.source_names == expected.source_names


def test_levels_of_which_none_has_most_images_are_refused(tmp_path):
    put(tmp_path, "ant/0.png", "bee/0.png", "film/ant/0.png", "film/bee/0.png")
    with pytest.raises(DataError, match=r"2 such as ant/0\.png, 2 such as film/ant/0\.png: move them$"):
        load_image_folder(tmp_path, drop=True)
    put(tmp_path / "deep", "a/b/c/0.png")
    for drop in (False, True):
        with pytest.raises(DataError, match="throughout"):
            load_image_folder(tmp_path / "deep", drop=drop)


def test_nothing_left_is_refused(tmp_path):
    classes(tmp_path / "train", 1)
    for name in ("ant", "bee"):
        spoil(tmp_path / "train" / name / "00.png")
    for drop in (False, True):
        with pytest.raises(DataError, match="can be read"):
            config(tmp_path, drop=drop).build(RECIPE)


def test_classes_that_the_target_lacks_are_named(tmp_path, warned):
    classes(tmp_path / "train")
    classes(tmp_path / "val", 2, ("ant",))
    config(tmp_path).build(RECIPE)
    assert "the target" in warned.text
    assert "['bee']" in warned.text


def test_a_grey_file_that_sorts_first_leaves_the_colours(tmp_path):
    put(tmp_path, "ant/00.png", shape=(6, 6))
    put(tmp_path, *(f"{c}/1{i}.png" for c in ("ant", "bee") for i in range(5)))
    task = config(tmp_path, n_target=1, n_test=1).build(RECIPE)
    assert task.pool.examples.shape == task.target.examples.shape == (3, 6, 6)


def test_a_size_that_was_guessed_is_said(tmp_path, warned):
    classes(tmp_path)
    config(tmp_path).build(RECIPE)
    assert "sizes" not in warned.text
    put(tmp_path, "ant/0.png", shape=(4, 5, 3))
    assert config(tmp_path).build(RECIPE).pool.examples.shape == (3, 4, 5)
    assert "2 sizes, most often 6x6" in warned.text
    assert "5x4" in warned.text
    warned.clear()
    config(tmp_path, image_size=4).build(RECIPE)
    assert "sizes" not in warned.text


def test_frames_that_are_not_used_are_counted(tmp_path, warned):
    classes(tmp_path)
    frames = [Image.fromarray(picture(i)) for i in range(3)]
    for name in ("film.gif", "pages.tif"):
        frames[0].save(tmp_path / "ant" / name, save_all=True, append_images=frames[1:])
    task = config(tmp_path).build(RECIPE)
    assert len(task.pool) + len(task.target) + len(task.test) == 22
    assert "2 image files have several frames" in warned.text


def test_no_image_is_decoded_more_than_once_to_build_and_check_a_task(tmp_path, monkeypatch):
    for name in ("train", "val", "test"):
        classes(tmp_path / name, 6)
    decoded = []
    real = ImageFiles._read
    monkeypatch.setattr(ImageFiles, "_read", lambda self, row: decoded.append(self._rows[row][0]) or real(self, row))
    for drop in (False, True):
        decoded.clear()
        task = config(tmp_path, drop=drop).build(RECIPE)
        task.check()
        assert all(task.identity.values())
        assert len(decoded) == len(set(decoded)) == 36


def test_only_images_that_are_used_are_decoded(tmp_path, monkeypatch):
    classes(tmp_path, 20)
    decoded = []
    real = ImageFiles._read
    monkeypatch.setattr(ImageFiles, "_read", lambda self, row: decoded.append(row) or real(self, row))
    config(tmp_path, n_pool=5, n_target=3, n_test=2).build(RECIPE).check()
    assert len(decoded) == 10


def test_a_plan_reads_names_and_one_image(tmp_path, monkeypatch):
    for name in ("train", "val", "test"):
        classes(tmp_path / name, 6)
    task = config(tmp_path, sources=[SyntheticSource("a", classes=["ant"])]).build(RECIPE)
    opened = []
    real = images_module.open_image
    monkeypatch.setattr(images_module, "open_image", lambda item, name: opened.append(item) or real(item, name))
    meta = config(tmp_path, sources=[SyntheticSource("a", classes=["ant"])]).meta(RECIPE)
    assert len(opened) == 1
    for part in ("pool", "target", "test"):
        mine, its = getattr(meta, part), getattr(task, part)
        assert len(mine) == len(its)
        assert meta.costs.forward_pool(mine) == task.costs.forward_pool(its)


def test_a_plan_counts_what_is_left_out(tmp_path):
    classes(tmp_path)
    spoil(tmp_path / "ant" / "02.png")
    meta, task = (getattr(config(tmp_path, drop=True), step)(RECIPE) for step in ("meta", "build"))
    assert [len(p) for p in (meta.pool, meta.target, meta.test)] == [
        len(p) for p in (task.pool, task.target, task.test)
    ]
    assert sum(len(p) for p in (meta.pool, meta.target, meta.test)) == 19


@pytest.mark.parametrize("wanted", [[2], ["2"]])
def test_a_class_named_by_a_number_is_meant_by_its_name(tmp_path, wanted):
    classes(tmp_path, 4, [str(i) for i in range(12)])
    task = config(tmp_path, n_target=1, n_test=1, sources=[SyntheticSource("a", classes=wanted)]).build(RECIPE)
    assert {i.split("/")[0] for i in task.pool.ids.to_pylist()} == {"2"}


def test_names_that_are_not_utf_8_are_named_or_left_out(tmp_path):
    classes(tmp_path)
    try:
        os.link(tmp_path / "ant" / "00.png", os.fsencode(tmp_path / "ant") + b"/\xff.png")
    except OSError:
        pytest.skip("the file system takes no such name")
    with pytest.raises(DataError, match="not UTF-8"):
        load_image_folder(tmp_path)
    assert len(load_image_folder(tmp_path, drop=True).train) == 20


def hub(folder, images, labels=None, splits=("train",)):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": images, "label": labels or [i % 2 for i in range(len(images))]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(dict.fromkeys(splits, dataset)).save_to_disk(str(folder))
    return str(folder)


def test_hub_images_are_in_colour_if_any_of_them_is(tmp_path):
    images = [Image.fromarray(picture(i, (6, 6) if i < 3 else (6, 6, 3))) for i in range(5)]
    assert load_hub(hub(tmp_path / "a", images)).train.shape == (3, 6, 6)
    assert load_hub(hub(tmp_path / "b", images[:3])).train.shape == (1, 6, 6)


def test_ids_of_hub_data_are_numbers_of_rows_also_if_some_are_left_out(tmp_path):
    stored = [{"bytes": None, "path": str(tmp_path / f"{i}.png")} for i in range(20)]
    put(tmp_path, *(f"{i}.png" for i in range(20)))
    folder = hub(tmp_path / "saved", stored)
    complete = VisionConfig(dataset="hub", path=folder, hidden=4).build(RECIPE)
    assert complete.pool.ids[0].as_py().startswith("train-000")
    loaded = load_hub(folder, drop=True)
    assert loaded.train_ids.to_pylist() == [f"train-{i:05}" for i in range(20)]
    null = [{"bytes": b"none", "path": None} if i == 7 else stored[i] for i in range(20)]
    folder = hub(tmp_path / "null", null)
    with pytest.raises(DataError, match=r"train-00007.*drop: true"):
        VisionConfig(dataset="hub", path=folder, hidden=4).build(RECIPE)
    task = VisionConfig(dataset="hub", path=folder, hidden=4, drop=True).build(RECIPE)
    ids = [i for pool in (task.pool, task.target, task.test) for i in pool.ids.to_pylist()]
    assert sorted(ids) == [f"train-{i:05}" for i in range(20) if i != 7]


def test_the_validation_split_of_hub_data_is_the_target_and_unused_ones_are_named(tmp_path, warned):
    images = [Image.fromarray(picture(i)) for i in range(6)]
    folder = hub(tmp_path / "a", images, splits=("train", "validation", "test", "extra"))
    assert len(load_hub(folder).target) == 6
    assert "['extra']" in warned.text
    assert load_hub(folder, test="validation").target is None
    assert len(load_hub(folder, target="extra").target) == 6
    with pytest.raises(ConfigError, match="target_path = 'dev'"):
        load_hub(folder, target="dev")


def test_arrays_may_have_a_target_of_their_own(tmp_path):
    for i, split in enumerate(("train", "val", "test")):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "images.npy", picture(i, (8, 4, 4)))
        np.save(tmp_path / split / "labels.npy", np.arange(8) % 2)
    assert load_arrays(tmp_path, test=tmp_path / "val").target is None
    settings = {"dataset": "arrays", "path": str(tmp_path), "hidden": 4}
    task = VisionConfig(**settings).build(RECIPE)
    assert (len(task.pool), len(task.target), len(task.test)) == (8, 8, 8)
    assert task.target.ids[0].as_py() == "target-00000"
