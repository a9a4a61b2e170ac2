"""Image files as people see them: in colour, upright, and on white where they are transparent."""

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from cads.errors import DataError
from cads.tasks.vision import images as images_module
from cads.tasks.vision.images import ImageFiles

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def files(folder, *images, **options):
    """The payload of these PIL images, written as PNG, in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, image in enumerate(images):
        rows.append((str(folder / f"{i}.png"),))
        image.save(rows[-1][0])
    return ImageFiles(rows, 0, [0] * len(rows), **options)


def corner(payload, i=0):
    """The first pixel of an image."""
    return tuple(payload.pixels(np.array([i]))[0, :, 0, 0].tolist())


def grey(value=7):
    return Image.new("L", (4, 4), value)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_image_in_colour_makes_all_colour_wherever_it_stands(tmp_path, place):
    images = [grey(), grey(), grey()]
    images[place] = Image.new("RGB", (4, 4), RED)
    payload = files(tmp_path, *images)
    assert payload.shape == (3, 4, 4)
    assert corner(payload, place) == RED
    assert corner(payload, (place + 1) % 3) == (7, 7, 7)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr"])
def test_every_mode_with_colour_is_colour(tmp_path, mode):
    rows = [(grey(),), (Image.new("RGB", (4, 4), RED).convert(mode),)]
    payload = ImageFiles(rows, 0, [0, 0])
    assert payload.shape == (3, 4, 4)
    assert np.allclose(corner(payload, 1), RED, atol=2)


@pytest.mark.parametrize("other", [Image.new("1", (4, 4), 1), Image.new("LA", (4, 4), (255, 255))])
def test_images_that_are_all_grey_stay_grey(tmp_path, other):
    payload = files(tmp_path, grey(), other)
    assert payload.shape == (1, 4, 4)
    assert [corner(payload, i) for i in (0, 1)] == [(7,), (255,)]


def test_grey_images_are_not_decoded_to_find_their_mode(tmp_path, monkeypatch):
    opened = []
    real = images_module.open_image
    monkeypatch.setattr(images_module, "open_image", lambda item, name: opened.append(item) or real(item, name))
    files(tmp_path, *[grey()] * 50)
    assert len(opened) == 1


def test_transparent_pixels_show_white_and_opaque_ones_their_colour(tmp_path):
    hidden, half, opaque = (Image.new("RGBA", (4, 4), (*RED, alpha)) for alpha in (0, 128, 255))
    payload = files(tmp_path, hidden, half, opaque)
    assert corner(payload, 0) == WHITE
    assert corner(payload, 1) == (255, 127, 127)
    assert corner(payload, 2) == RED
    assert corner(files(tmp_path / "grey", Image.new("LA", (4, 4), (9, 0)))) == (255,)


def test_a_transparent_colour_shows_white_in_palettes_and_without_alpha(tmp_path):
    rgb = Image.new("RGB", (4, 4), BLUE)
    rgb.putpixel((0, 0), RED)
    rgb.info["transparency"] = RED
    rgb.save(tmp_path / "rgb.png", transparency=RED)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=0)
    for name in ("rgb", "palette"):
        payload = ImageFiles([(str(tmp_path / f"{name}.png"),)], 0, [0])
        pixels = payload.pixels(np.array([0]))[0]
        assert tuple(pixels[:, 0, 0].tolist()) == WHITE
        assert tuple(pixels[:, 2, 2].tolist()) == BLUE


def test_palettes_show_their_colours(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([*RED, *BLUE])
    assert corner(files(tmp_path, palette)) == BLUE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "tif", "jpg", "webp"])
def test_images_are_turned_as_their_exif_data_says(tmp_path, orientation, extension):
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16], upright[8:, 16:] = RED, BLUE
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a.{extension}"
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    stored.save(path, exif=exif, **({"lossless": True} if extension == "webp" else {}))
    payload = ImageFiles([(str(path),)], 0, [0])
    assert payload.shape == (3, 16, 32)
    seen = payload.pixels(np.array([0]))[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(seen[4, 8] - RED).max() < 30
    assert np.abs(seen[12, 24] - BLUE).max() < 30
    if extension in ("png", "tif"):
        assert np.array_equal(seen, upright)


def test_an_image_in_memory_is_not_changed():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.new("RGB", (8, 4), RED)
    image.getexif()[ExifTags.Base.Orientation] = 6
    payload = ImageFiles([(image,)], 0, [0])
    assert payload.shape == (3, 8, 4)
    assert image.size == (8, 4)
    assert payload.pixels(np.array([0])).shape == (1, 3, 8, 4)


def test_reading_once_gives_the_digests_and_sums_of_the_pixels(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [Image.fromarray(rng.integers(0, 256, (5 + i % 2, 6, 3), dtype=np.uint8)) for i in range(70)]
    payload = files(tmp_path, *arrays)
    read, errors = payload.read()
    assert errors == {}
    assert read.digests() == payload.digests()
    positions = np.array([69, 3, 3, 40])
    assert torch.equal(read.channel_sums(positions), payload.channel_sums(positions))
    taken = read.take(positions)
    assert taken.digests() == payload.take(positions).digests()
    assert torch.equal(taken.channel_sums(np.arange(2)), payload.channel_sums(positions[:2]))
    assert sorted(set(map(tuple, read.reading.sizes.tolist()))) == [(6, 5), (6, 6)]


def test_after_reading_once_nothing_is_decoded_for_digests_and_sums(tmp_path, monkeypatch):
    payload, _ = files(tmp_path, *[grey(i) for i in range(40)]).read()
    monkeypatch.setattr(images_module, "open_image", lambda *_: pytest.fail("decoded again"))
    taken = payload.take(np.arange(0, 40, 2)).relabel(torch.ones(20, dtype=torch.int64))
    assert len(taken.digests()) == 20
    assert taken.channel_sums(np.arange(3))[0].tolist() == [(0 + 2 + 4) * 16]
    assert taken.read()[1] == {}


def test_reading_names_each_image_that_cannot_be_read(tmp_path):
    payload = files(tmp_path, *[grey(i) for i in range(50)])
    (tmp_path / "3.png").write_bytes(b"no image")
    image_bytes = (tmp_path / "41.png").read_bytes()
    (tmp_path / "41.png").write_bytes(image_bytes[: len(image_bytes) // 2])
    (tmp_path / "49.png").unlink()
    _, errors = payload.read()
    assert sorted(errors) == [3, 41, 49]
    assert all(f"{i}.png cannot be read" in error for i, error in errors.items())


def test_the_first_image_that_can_be_read_gives_the_size(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    Image.new("RGB", (5, 3)).save(tmp_path / "good.png")
    rows = [(str(tmp_path / name),) for name in ("bad.png", "good.png")]
    assert ImageFiles(rows, 0, [0, 0]).shape == (3, 3, 5)
    with pytest.raises(DataError, match=r"none of 2 images can be read; the first: .*bad\.png"):
        ImageFiles(rows[:1] * 2, 0, [0, 0])


def test_a_damaged_image_in_colour_does_not_make_grey_images_colour(tmp_path):
    payload = files(tmp_path, grey(), Image.fromarray(np.full((40, 40, 3), 9, dtype=np.uint8)), grey())
    image_bytes = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(image_bytes[:50])
    rows = [(str(tmp_path / f"{i}.png"),) for i in range(3)]
    assert payload.shape == (3, 4, 4)
    assert ImageFiles(rows, 0, [0, 0, 0]).shape == (1, 4, 4)
