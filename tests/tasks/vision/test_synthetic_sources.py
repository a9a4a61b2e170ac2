"""Made sources: the truth about them, and the laws they obey."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cads.errors import ConfigError, DataError
from cads.tasks.vision.images import ImageFiles, ImageTensors
from cads.tasks.vision.synthetic_sources import (
    SyntheticSource,
    TransformedImages,
    blur,
    in_numbers,
    invert,
    make_synthetic_sources,
    rotate,
)

N_CLASSES = 5


def clean(n=1000, side=6, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, 1, side, side), dtype=np.uint8)
    return ImageTensors(torch.from_numpy(pixels), torch.from_numpy(rng.integers(0, N_CLASSES, n)))


def part(made, name):
    return np.flatnonzero(made.sources == made.names.index(name))


@st.composite
def specs(draw):
    def spec(i):
        classes = draw(st.none() | st.lists(st.integers(0, N_CLASSES - 1), min_size=1, max_size=N_CLASSES, unique=True))
        n = N_CLASSES if classes is None else len(classes)
        weights = draw(st.none() | st.lists(st.floats(0.1, 9), min_size=n, max_size=n))
        return SyntheticSource(
            f"s{i}",
            size=draw(st.none() | st.integers(1, 60)),
            label_noise=draw(st.sampled_from([0.0, 0.3, 1.0])),
            classes=classes,
            transform=draw(st.sampled_from(["none", "invert", "rotate"])),
            duplicates=draw(st.integers(1, 4)),
            class_weights=weights,
        )

    return [spec(i) for i in range(draw(st.integers(1, 6)))]


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(0, 2**32))
def test_laws_of_all_sources(specs, seed):
    images = clean(400)
    try:
        pool = make_synthetic_sources(images, specs, N_CLASSES, seed)
    except DataError:
        return
    assert len(pool.images) == len(pool.sources) == len(pool.origins) == len(pool.corrupted)
    assert (pool.sources[1:] >= pool.sources[:-1]).all()
    pairs = set(zip(pool.origins.tolist(), pool.copies.tolist(), strict=True))
    assert len(pairs) == len(pool.origins), "an example and copy number name one row"
    owners = {}
    for origin, source in zip(pool.origins.tolist(), pool.sources.tolist(), strict=True):
        assert owners.setdefault(origin, source) == source, "sources share no example"
    assert torch.equal(pool.true_labels, images.labels[torch.from_numpy(pool.origins)])
    assert np.array_equal(pool.corrupted, (pool.images.labels != pool.true_labels).numpy())
    assert pool.images.labels.min() >= 0
    assert pool.images.labels.max() < N_CLASSES
    for spec in specs:
        mine = part(pool, spec.name)
        assert spec.size in (None, len(mine))
        assert spec.classes is None or set(pool.true_labels[mine].tolist()) <= set(spec.classes)
        assert np.unique(pool.origins[mine], return_counts=True)[1].max() <= spec.duplicates
        assert len(np.unique(pool.origins[mine])) == -(-len(mine) // spec.duplicates)


def test_the_same_seed_makes_the_same_sources_and_another_does_not():
    specs = [SyntheticSource("a", label_noise=0.5), SyntheticSource("b", transform="blur", duplicates=2)]
    first = make_synthetic_sources(clean(), specs, N_CLASSES, 7)
    again = make_synthetic_sources(clean(), specs, N_CLASSES, 7)
    other = make_synthetic_sources(clean(), specs, N_CLASSES, 8)
    assert np.array_equal(first.origins, again.origins)
    assert torch.equal(first.images.labels, again.images.labels)
    assert first.images.digests() == again.images.digests()
    assert not np.array_equal(first.origins, other.origins)
    assert not np.array_equal(first.corrupted, other.corrupted)


@pytest.mark.parametrize("noise", [0.0, 0.225, 0.9, 1.0])
def test_the_noise_level_is_the_share_of_wrong_labels(noise):
    pool = make_synthetic_sources(clean(20_000, side=1), [SyntheticSource("a", label_noise=noise)], N_CLASSES, 0)
    four_deviations = 4 * np.sqrt(noise * (1 - noise) / 20_000)
    assert abs(pool.corrupted.mean() - noise) <= four_deviations
    if noise:
        shift = (pool.images.labels - pool.true_labels)[pool.corrupted] % N_CLASSES
        shares = np.bincount(shift.numpy(), minlength=N_CLASSES) / len(shift)
        assert shares[0] == 0
        assert np.allclose(shares[1:], 1 / (N_CLASSES - 1), atol=0.03)


def test_copies_are_exact():
    pool = make_synthetic_sources(clean(), [SyntheticSource("a", 90, 0.5, duplicates=3)], N_CLASSES, 0)
    digests = pool.images.digests()
    for origin in np.unique(pool.origins):
        rows = np.flatnonzero(pool.origins == origin)
        assert len(rows) == 3
        assert sorted(pool.copies[rows]) == [0, 1, 2]
        assert len(set(pool.images.labels[rows].tolist())) == 1
        assert len({digests[row] for row in rows}) == 1


def test_sources_without_a_size_share_what_is_left():
    specs = [
        SyntheticSource("a"),
        SyntheticSource("b", size=303),
        SyntheticSource("c"),
        SyntheticSource("d", duplicates=2),
    ]
    pool = make_synthetic_sources(clean(), specs, N_CLASSES, 0)
    sizes = np.bincount(pool.sources)
    assert sizes[1] == 303
    assert sorted(sizes[[0, 2, 3]]) == [232, 232, 233]


def test_sized_sources_may_use_everything_up():
    specs = [SyntheticSource(str(i), size=200) for i in range(4)]
    specs.append(SyntheticSource("zeros", classes=[0], size=200))
    images = clean().relabel(torch.arange(1000) % N_CLASSES)
    pool = make_synthetic_sources(images, specs, N_CLASSES, 0)
    assert sorted(pool.origins) == list(range(1000))


def test_class_weights_are_the_proportions():
    weighted = SyntheticSource("a", 100, class_weights=[8, 1, 1, 0, 0])
    rest = SyntheticSource("b", classes=[3, 1], class_weights=[1, 3])
    pool = make_synthetic_sources(clean(), [weighted, rest], N_CLASSES, 0)
    assert np.bincount(pool.true_labels[part(pool, "a")], minlength=N_CLASSES).tolist() == [80, 10, 10, 0, 0]
    counts = np.bincount(pool.true_labels[part(pool, "b")], minlength=N_CLASSES)
    assert abs(counts[1] - 3 * counts[3]) <= 3
    assert counts[[0, 2, 4]].sum() == 0


def test_transforms_are_known():
    images = clean(20).images
    assert torch.equal(invert(invert(images)), images)
    assert torch.equal(invert(images), 255 - images)
    turned = images
    for _ in range(4):
        turned = rotate(turned)
    assert torch.equal(turned, images)
    assert torch.equal(rotate(images)[..., 0, :], images[..., :, -1])
    assert torch.equal(blur(torch.full((2, 3, 28, 28), 77, dtype=torch.uint8)), torch.full((2, 3, 28, 28), 77))
    smooth = blur(clean(20, side=28).images)
    assert smooth.dtype == torch.uint8
    assert smooth.float().std() < 0.5 * clean(20, side=28).images.float().std()


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_blur_takes_images_of_any_size(side):
    assert blur(clean(2, side=side).images).shape == (2, 1, side, side)


def test_images_behind_files_are_transformed_as_those_in_memory():
    memory = clean(60)
    rows = [(Image.fromarray(x[0].numpy()),) for x in memory.images]
    files = ImageFiles(rows, 0, memory.labels.numpy())
    specs = [SyntheticSource("a", transform="rotate"), SyntheticSource("b", label_noise=0.5, transform="invert")]
    one, two = (make_synthetic_sources(images, specs, N_CLASSES, 0) for images in (memory, files))
    assert isinstance(one.images, ImageTensors)
    assert isinstance(two.images, TransformedImages)
    assert one.images.digests() == two.images.digests()
    assert torch.equal(one.images.labels, two.images.labels)
    some = np.array([50, 3, 31])
    assert one.images.take(some).digests() == two.images.take(some).digests()
    assert torch.equal(one.images.take(some).labels, two.images.take(some).labels)
    inverted = part(one, "b")
    assert torch.equal(one.images.pixels(inverted), 255 - memory.pixels(one.origins[inverted]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_noise": 1.1}, "label_noise = 1.1"),
        ({"label_noise": -0.1}, "label_noise"),
        ({"label_noise": float("nan")}, "label_noise"),
        ({"size": 0}, "size = 0"),
        ({"duplicates": 0}, "duplicates = 0"),
        ({"transform": "shear"}, "transform = 'shear'"),
        ({"classes": []}, r"classes = \[\]"),
        ({"classes": [1, 1]}, "each once"),
        ({"class_weights": [0, 0]}, "not all 0"),
        ({"class_weights": [1, -1]}, ">= 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SyntheticSource("a", **settings)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "at least one"),
        ([SyntheticSource("a"), SyntheticSource("a")], "each once"),
        ([SyntheticSource("a", classes=[2, 5])], r"classes \[5\] are unknown: use 0\.\.4"),
        ([SyntheticSource("a", classes=[1], class_weights=[1, 2])], "2 class_weights for 1 classes"),
    ],
)
def test_sources_that_do_not_fit_are_refused(specs, message):
    with pytest.raises(ConfigError, match=message):
        make_synthetic_sources(clean(50), specs, N_CLASSES, 0)


def test_too_few_examples_are_counted():
    images = clean(1000)
    zeros = int((images.labels == 0).sum())
    with pytest.raises(DataError, match=f"'a' needs 900 distinct examples, and {zeros} are there"):
        make_synthetic_sources(images, [SyntheticSource("a", 900, classes=[0])], N_CLASSES, 0)
    with pytest.raises(DataError, match="'b' needs 501 distinct examples, and 500 are there"):
        make_synthetic_sources(images, [SyntheticSource("a", 500), SyntheticSource("b", 501)], N_CLASSES, 0)
    with pytest.raises(DataError, match="nothing is left for source 'b'"):
        make_synthetic_sources(images, [SyntheticSource("a", 1000), SyntheticSource("b")], N_CLASSES, 0)
    assert len(make_synthetic_sources(images, [SyntheticSource("a", 1800, duplicates=2)], N_CLASSES, 0).images) == 1800


def test_labels_that_are_none_are_refused():
    with pytest.raises(DataError, match=r"use 0\.\.2"):
        make_synthetic_sources(clean(50), [SyntheticSource("a")], 3, 0)


def test_rotation_needs_square_images():
    oblong = ImageTensors(torch.zeros(4, 1, 2, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="square"):
        make_synthetic_sources(oblong, [SyntheticSource("a", transform="rotate")], 2, 0)


def test_noise_needs_another_class():
    with pytest.raises(ConfigError, match="two classes"):
        make_synthetic_sources(
            clean(9).relabel(torch.zeros(9, dtype=torch.int64)), [SyntheticSource("a", None, 0.5)], 1, 0
        )


@pytest.mark.parametrize(
    ("names", "classes", "numbers"),
    [
        (["0", "1", "10", "11", "2"], [2, "10"], [4, 2]),
        (["00", "07", "10"], [7], [1]),
        (["ant", "bee", "2"], ["bee", 2], [1, 2]),
        (["ant", "bee"], ["bee", "ant"], [1, 0]),
    ],
)
def test_names_of_classes_win_over_indices(names, classes, numbers, caplog):
    [result] = in_numbers([SyntheticSource("a", classes=classes)], names)
    assert result.classes == numbers
    assert caplog.text == ""


def test_an_index_is_taken_where_no_class_has_a_number_and_is_said(caplog):
    [result] = in_numbers([SyntheticSource("a", classes=[1])], ["ant", "bee", "cow"])
    assert result.classes == [1]
    assert "['bee']" in caplog.text


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        (["1", "2", "3"], [0], r"classes \[0\] are unknown: use names, '1', '2', '3'"),
        (["ant", "bee"], [2], r"classes \[2\] are unknown.*or an index, 0\.\.1"),
        (["ant", "bee"], ["cow"], r"classes \['cow'\] are unknown"),
        (["ant", "bee"], [1, "bee"], "name one class twice"),
        (["01", "1", "2"], [1, "1"], "name one class twice"),
    ],
)
def test_classes_that_are_none_are_refused(names, classes, message):
    with pytest.raises(ConfigError, match=message):
        in_numbers([SyntheticSource("a", classes=classes)], names)
