"""Projections keep inner products, are the same wherever they are made, and refuse to lose what they are given."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.gradients.projection import PROJECTED, ProjectionError, Sketch, Whole, check_dimension, make_projection
from cads.errors import ConfigError

SIZES = {"a": 300, "b.weight": 64, "c": 17}
D = 64


def vectors(n, seed=0, sizes=SIZES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, size, generator=generator) for name, size in sizes.items()}


def project(projection, rows):
    into = projection.empty(len(next(iter(rows.values()))))
    for name, part in rows.items():
        projection.add(name, part, into)
    return into


def matrix(projection):
    """The map as a matrix, (entries, d), from unit vectors."""
    identity = torch.eye(projection.size)
    parts = identity.split(list(projection.sizes.values()), dim=1)
    return project(projection, dict(zip(projection.sizes, parts, strict=True)))


def test_each_entry_goes_to_one_place_with_a_sign():
    m = matrix(Sketch(SIZES, D, 0))
    assert (m.abs().sum(dim=1) == 1).all()
    assert set(m.unique().tolist()) == {-1.0, 0.0, 1.0}


def test_places_of_a_parameter_are_equally_full():
    m = matrix(Sketch(SIZES, D, 0)).abs()
    for part in m.split(list(SIZES.values())):
        counts = part.sum(dim=0)
        assert counts.max() - counts.min() <= 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 381))
def test_it_is_the_linear_map_of_its_matrix(seed, d):
    projection, rows = Sketch(SIZES, d, seed), vectors(5, seed)
    exact = torch.cat(list(rows.values()), dim=1).double() @ matrix(projection)
    torch.testing.assert_close(project(projection, rows), exact, rtol=1e-5, atol=1e-5)


def test_inner_products_are_unbiased_with_the_variance_of_the_lemma():
    """Over 1,000 maps: mean <x, y> and variance at most (|x|^2 |y|^2 + <x, y>^2) / d, also for spiky vectors."""
    draws = 1000
    for name, spiky in (("dense", False), ("spiky", True)):
        rows = vectors(2, 3)
        if spiky:
            rows = {n: x * (torch.arange(x.shape[1]) < 3) for n, x in rows.items()}
        x, y = torch.cat(list(rows.values()), dim=1).double()
        bound = float((x @ x) * (y @ y) + (x @ y) ** 2) / D
        result = np.array([float(torch.prod(project(Sketch(SIZES, D, s), rows), dim=0).sum()) for s in range(draws)])
        assert abs(result.mean() - float(x @ y)) < 5 * np.sqrt(bound / draws), name
        # 1.23: five standard deviations of the variance of 1,000 draws.
        assert result.var() < 1.23 * bound, name


def test_inner_products_are_kept_within_five_percent_over_2000_draws():
    """Of all pairs that are alike (cosine of 0.25 at least): the mean over 2,000 maps, to rtol 0.05."""
    common, own = vectors(1, 4), vectors(8, 5)
    rows = {name: common[name] + own[name] for name in SIZES}
    x = torch.cat(list(rows.values()), dim=1).double()
    exact, total = x @ x.T, torch.zeros(8, 8, dtype=torch.float64)
    assert (exact >= 0.25 * x.norm(dim=1)[:, None] * x.norm(dim=1)).all()
    for seed in range(2000):
        projected = project(Sketch(SIZES, D, seed), rows)
        total += projected @ projected.T
    torch.testing.assert_close(total / 2000, exact, rtol=0.05, atol=0.0)


def test_equal_over_batch_sizes_orders_and_calls():
    rows = vectors(33)
    at_once = project(Sketch(SIZES, D, 5), rows)
    one = Sketch(SIZES, D, 5)
    into = one.empty(33)
    for i in reversed(range(33)):
        for name in reversed(SIZES):
            one.add(name, rows[name][i : i + 1], into[i : i + 1])
    torch.testing.assert_close(into, at_once, rtol=1e-6, atol=1e-6)


def test_a_parameter_is_projected_alike_whatever_stands_beside_it():
    rows = vectors(2)
    alone = project(Sketch({"a": 300}, D, 7), {"a": rows["a"]})
    beside = project(Sketch(SIZES, D, 7), {n: x if n == "a" else 0 * x for n, x in rows.items()})
    assert torch.equal(alone, beside)


def test_seeds_and_names_draw_different_maps_and_global_state_none():
    torch.manual_seed(1)
    first = matrix(Sketch(SIZES, D, 0))
    torch.manual_seed(2)
    assert torch.equal(first, matrix(Sketch(SIZES, D, 0)))
    assert not torch.equal(first, matrix(Sketch(SIZES, D, 1)))
    same_size = matrix(Sketch({"p": 100, "q": 100}, D, 0))
    assert not torch.equal(same_size[:100], same_size[100:])


def test_no_projection_is_the_gradient_itself():
    rows = vectors(3)
    assert torch.equal(project(Whole(SIZES), rows).float(), torch.cat(list(rows.values()), dim=1))


def test_auto_projects_only_what_is_larger():
    assert isinstance(make_projection(SIZES, "auto", 0), Whole)
    assert isinstance(make_projection(SIZES, None, 0), Whole)
    assert make_projection({"a": PROJECTED + 1}, "auto", 0).dimension == PROJECTED
    assert isinstance(make_projection(SIZES, 381, 0), Sketch)


@pytest.mark.parametrize("dimension", [0, -3, 382])
def test_a_dimension_that_is_no_projection_is_refused(dimension):
    with pytest.raises(ConfigError, match=f"dimension = {dimension}"):
        make_projection(SIZES, dimension, 0)
    with pytest.raises(ConfigError):
        check_dimension(dimension, 381)


def test_no_parameter_is_refused():
    with pytest.raises(ConfigError, match="parameters with entries"):
        make_projection({}, None, 0)


class Broken(Sketch):
    """A projection that goes wrong in one way."""

    def __init__(self, how):
        super().__init__(SIZES, D, 0)
        self.how = how

    def add(self, name, gradient, into):
        if self.how == "zeros":
            return
        super().add(name, gradient, into)
        if self.how == "nan":
            into[0, 3] = float("nan")
        if self.how == "scaled":
            into *= 3


@pytest.mark.parametrize("how", ["zeros", "nan", "scaled"])
def test_the_self_test_fails_loudly(how):
    with pytest.raises(ProjectionError, match="dimensions"):
        Broken(how).check()


@pytest.mark.parametrize("d", [1, 7, 64, 381])
def test_the_self_test_passes_what_is_sound(d):
    for seed in range(20):
        Sketch(SIZES, d, seed).check()
    Whole(SIZES).check()
