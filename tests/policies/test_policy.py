"""Policies draw what they say, score what they draw, and stay where they must."""

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file
from scipy.integrate import quad
from scipy.optimize import LinearConstraint, minimize

from cads.errors import CheckpointError, ConfigError
from cads.policies.base import METADATA_KEY, Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.policies.mixture import MixturePolicy
from cads.policies.simplex import project_capped_simplex

LAW = settings(deadline=None)
"""A busy machine must not fail a law."""

points = arrays(np.float64, st.integers(1, 12), elements=st.floats(-3, 3))
caps = st.floats(0, 13)


def by_breakpoints(s: np.ndarray, k: float) -> np.ndarray:
    """The projection by sorting every breakpoint of the threshold: O(N^2), exact."""
    clipped = np.clip(s, 0, 1)
    if clipped.sum() <= k:
        return clipped
    taus = np.unique(np.concatenate([[0.0], s, s - 1]))
    sums = np.array([np.clip(s - tau, 0, 1).sum() for tau in taus])
    tau = np.interp(k, sums[::-1], taus[::-1])
    return np.clip(s - tau, 0, 1)


@LAW
@given(points, caps)
def test_projection_equals_the_sorted_reference(s: np.ndarray, k: float) -> None:
    np.testing.assert_allclose(project_capped_simplex(s, k), by_breakpoints(s, k), atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_projection_is_the_nearest_feasible_point(seed: int) -> None:
    rng = np.random.default_rng(seed)
    s, k = rng.normal(0.5, 1, 6), rng.uniform(0.2, 3)

    def distance(x: np.ndarray) -> float:
        return float(((x - s) ** 2).sum())

    result = minimize(
        distance,
        np.full(6, k / 6),
        bounds=[(0.0, 1.0)] * 6,
        constraints=LinearConstraint(np.ones(6), ub=k),
        method="SLSQP",
        tol=1e-14,
    )
    np.testing.assert_allclose(project_capped_simplex(s, k), result.x, atol=1e-6)


@LAW
@given(points, caps)
def test_projection_is_feasible_idempotent_and_the_identity_inside(s: np.ndarray, k: float) -> None:
    x = project_capped_simplex(s, k)
    assert x.min() >= 0
    assert x.max() <= 1
    assert x.sum() <= k + 1e-9
    np.testing.assert_allclose(project_capped_simplex(x, k), x, atol=1e-12)
    if s.min() >= 0 and s.max() <= 1 and s.sum() <= k:
        np.testing.assert_array_equal(x, s)


@LAW
@given(st.integers(1, 12).flatmap(lambda n: arrays(np.float64, (2, n), elements=st.floats(-3, 3))), caps)
def test_projection_never_expands_distances(pair: np.ndarray, k: float) -> None:
    projected = [project_capped_simplex(s, k) for s in pair]
    assert np.linalg.norm(projected[0] - projected[1]) <= np.linalg.norm(pair[0] - pair[1]) + 1e-9


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1.0, 1e10, 1e300])
@pytest.mark.parametrize("k", [0.3, 1.5, 2.5])
def test_the_sum_is_exact_whatever_the_magnitude(scale: float, k: float) -> None:
    s = scale * np.array([1.0, 0.9, 0.5, -1.0]) + np.array([1.0, 0.5, 1.0, 0.0])
    expected = min(k, np.clip(s, 0, 1).sum())
    assert project_capped_simplex(s, k).sum() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("k", [3.0, 1e3, 3e5])
def test_projection_of_a_million(k: float) -> None:
    s = np.random.default_rng(0).exponential(size=10**6) ** 3
    assert project_capped_simplex(s, k).sum() == pytest.approx(k, abs=1e-6)


@pytest.mark.parametrize(
    ("s", "k"),
    [([np.nan], 1), ([np.inf], 1), ([], 1), ([[0.5]], 1), ([0.5], -1), ([0.5], np.nan), (["a"], 1)],
)
def test_projection_refuses(s: list[Any], k: float) -> None:
    with pytest.raises(ConfigError):
        project_capped_simplex(s, k)


def numerical_score(log_prob: Callable[[np.ndarray], np.ndarray], values: np.ndarray, step: float) -> np.ndarray:
    """Central differences of log_prob(values) -> (K,), in each value: (K, n)."""
    moves = step * np.eye(values.size)
    return np.stack([(log_prob(values + d) - log_prob(values - d)) / (2 * step) for d in moves], axis=1)


@LAW
@given(arrays(np.float64, st.integers(1, 8), elements=st.floats(0.05, 0.95)), st.integers(0, 99))
def test_bernoulli_score_is_the_derivative(s: np.ndarray, seed: int) -> None:
    policy = BernoulliPolicy(s)
    masks = policy.sample(5, np.random.default_rng(seed))
    expected = numerical_score(lambda v: BernoulliPolicy(v).log_prob(masks), s, 1e-6)
    np.testing.assert_allclose(policy.score(masks), expected, rtol=1e-5, atol=1e-5)


@LAW
@given(
    arrays(np.float64, st.integers(1, 5), elements=st.floats(0.01, 0.99)),
    st.floats(0.05, 20),
    st.integers(0, 99),
)
def test_mixture_score_is_the_derivative(means: np.ndarray, sigma: float, seed: int) -> None:
    policy = MixturePolicy(means, sigma)
    draws = policy.sample(4, np.random.default_rng(seed))
    expected = numerical_score(lambda v: MixturePolicy(v, sigma).log_prob(draws), means, 1e-4)
    np.testing.assert_allclose(policy.score(draws), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("policy", [BernoulliPolicy([0.1, 0.5, 0.9]), MixturePolicy([0.2, 0.3, 0.5], 0.3)])
def test_score_has_mean_zero_and_log_prob_mean_is_minus_entropy(policy: Policy) -> None:
    draws = policy.sample(200_000, np.random.default_rng(0))
    score, log_prob = policy.score(draws), policy.log_prob(draws)
    assert (np.abs(score.mean(axis=0)) < 5 * score.std(axis=0) / np.sqrt(len(draws))).all()
    assert -log_prob.mean() == pytest.approx(policy.entropy(), abs=5 * log_prob.std() / np.sqrt(len(draws)))


def test_bernoulli_frequencies() -> None:
    s = np.array([0.0, 0.02, 0.5, 0.97, 1.0])
    masks = BernoulliPolicy(s).sample(100_000, np.random.default_rng(1))
    assert masks.dtype == np.bool_
    assert (np.abs(masks.mean(axis=0) - s) <= 5 * np.sqrt(s * (1 - s) / len(masks))).all()


def test_draws_follow_the_generator_alone() -> None:
    for policy in (BernoulliPolicy([0.3, 0.6]), MixturePolicy([0.3, 0.7], 0.1)):
        first, again = (policy.sample(7, np.random.default_rng(3)) for _ in range(2))
        np.testing.assert_array_equal(first, again)
        assert policy.sample(0, np.random.default_rng(0)).shape == (0, 2)


def test_certain_items_have_finite_scores() -> None:
    policy = BernoulliPolicy([0.0, 1.0, 0.5])
    possible = np.array([[False, True, True], [False, True, False]])
    np.testing.assert_allclose(policy.log_prob(possible), np.log(0.5))
    np.testing.assert_array_equal(policy.score(possible), [[0, 0, 2], [0, 0, -2]])
    np.testing.assert_array_equal(policy.log_prob(~possible), -np.inf)
    assert np.isfinite(policy.score(~possible)).all()
    assert policy.entropy() == pytest.approx(np.log(2))


@pytest.mark.parametrize("sigma", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("mean", [0.0, 0.4, 1.0])
def test_mixture_density_integrates_to_one_and_is_what_is_drawn(mean: float, sigma: float) -> None:
    policy = MixturePolicy([mean, 0.5], sigma)
    other = MixturePolicy([0.5], sigma).log_prob(np.array([[0.5]]))[0]

    def density(r: float) -> float:
        return float(np.exp(policy.log_prob(np.array([[r, 0.5]]))[0] - other))

    breaks = [p for p in (mean - 4 * sigma, mean, mean + 4 * sigma) if 0 < p < 1] or None
    assert quad(density, 0, 1, points=breaks, limit=200)[0] == pytest.approx(1, rel=1e-6)
    draws = policy.sample(50_000, np.random.default_rng(0))[:, 0]
    for quantile in (0.1, 0.5, 0.9):
        below = quad(density, 0, np.quantile(draws, quantile), points=breaks, limit=200)[0]
        assert below == pytest.approx(quantile, abs=0.01)


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 1.0, 1e6])
def test_mixture_is_robust_at_the_edges(sigma: float) -> None:
    policy = MixturePolicy([0.0, 1.0, 0.5], sigma)
    draws = policy.sample(1000, np.random.default_rng(0))
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert np.isfinite(policy.log_prob(draws)).all()
    assert np.isfinite(policy.score(draws)).all()
    assert np.isfinite(policy.entropy())
    if sigma < 0.01:
        assert np.abs(draws - policy.means).max() < 9 * sigma


def test_ratios_are_mixtures() -> None:
    policy = MixturePolicy([0.2, 0.8], 0.5)
    rows = policy.ratios(policy.sample(50, np.random.default_rng(0)))
    np.testing.assert_allclose(rows.sum(axis=1), 1)
    for bad in ([[0.0, 0.0]], [[-0.1, 1.0]], [[np.nan, 1.0]]):
        with pytest.raises(ConfigError):
            policy.ratios(np.array(bad))
    np.testing.assert_array_equal(policy.log_prob(np.array([[1.5, 0.5]])), -np.inf)


@LAW
@given(arrays(np.float64, 5, elements=st.floats(0.1, 0.2)), arrays(np.float64, 5, elements=st.floats(-50, 50)))
def test_steps_stay_feasible(start: np.ndarray, gradient: np.ndarray) -> None:
    bernoulli = BernoulliPolicy(start, cap=1.0)
    bernoulli.step(gradient, 0.1)
    np.testing.assert_allclose(bernoulli.probabilities, project_capped_simplex(start - 0.1 * gradient, 1.0), atol=1e-12)
    mixture = MixturePolicy(start, 0.1)
    mixture.step(gradient, 0.1)
    assert mixture.means.min() >= 0
    assert mixture.means.sum() == pytest.approx(1)
    # Nearest point of the simplex: all positive entries moved by one and the same amount, the others by less.
    moved = start - 0.1 * gradient - mixture.means
    positive = mixture.means > 0
    assert np.ptp(moved[positive]) < 1e-9
    assert moved[~positive].max(initial=-np.inf) <= moved[positive].max() + 1e-9


def test_steps_descend() -> None:
    policy = BernoulliPolicy([0.5, 0.5])
    policy.step([1.0, -1.0], 0.1)
    np.testing.assert_allclose(policy.probabilities, [0.4, 0.6])
    for gradient, size in (([np.nan, 0], 0.1), ([1.0], 0.1), ([1.0, 1.0], -1.0), ([1e308, 0], 1e10)):
        with pytest.raises(ConfigError):
            policy.step(gradient, size)
    np.testing.assert_allclose(policy.probabilities, [0.4, 0.6])


@pytest.mark.parametrize(
    "build",
    [
        lambda: BernoulliPolicy([]),
        lambda: BernoulliPolicy([0.5, np.nan]),
        lambda: BernoulliPolicy([1.5]),
        lambda: BernoulliPolicy([[0.5]]),
        lambda: BernoulliPolicy([0.5], floor=0),
        lambda: BernoulliPolicy([0.5], cap=-1),
        lambda: BernoulliPolicy([0.5, 0.5], cap=0.5),
        lambda: MixturePolicy([0.0, 0.0], 0.1),
        lambda: MixturePolicy([0.5, 0.5], 0.0),
        lambda: MixturePolicy([0.5, 0.5], np.nan),
        lambda: BernoulliPolicy([0.5]).sample(-1, np.random.default_rng(0)),
        lambda: BernoulliPolicy([0.5]).score(np.ones((1, 1))),
        lambda: BernoulliPolicy([0.5]).log_prob(np.ones((1, 2), dtype=bool)),
        lambda: MixturePolicy([0.5], 0.1).score(np.ones(1)),
    ],
)
def test_bad_settings_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        build()


@pytest.mark.parametrize(
    "policy", [BernoulliPolicy([0.1, 1 / 3], floor=0.01, cap=1.5), MixturePolicy([0.1, 0.9], 1 / 3)]
)
def test_saved_and_loaded_policies_draw_the_same(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    policy.save(path)
    loaded = type(policy).load(path)
    draws = policy.sample(5, np.random.default_rng(0))
    np.testing.assert_array_equal(loaded.sample(5, np.random.default_rng(0)), draws)
    np.testing.assert_array_equal(loaded.score(draws), policy.score(draws))
    policy.step(np.array([-9.0, -9.0]), 1.0)
    loaded.step(np.array([-9.0, -9.0]), 1.0)
    np.testing.assert_array_equal(loaded.log_prob(draws), policy.log_prob(draws))
    assert [file.name for file in tmp_path.iterdir()] == ["policy.safetensors"]


def write(path: Path, tensors: dict[str, np.ndarray], **header: object) -> None:
    good = {"class": "BernoulliPolicy", "schema": 1, "settings": {"floor": 1e-3, "cap": None}}
    save_file(tensors, path, {METADATA_KEY: json.dumps(good | header)})


def foreign_numbers(dtype: str, size: int) -> bytes:
    """A whole file with one number of a type that numpy does not know."""
    stated = {"class": "BernoulliPolicy", "schema": 1, "settings": {"floor": 1e-3, "cap": None}}
    header = json.dumps(
        {
            "__metadata__": {METADATA_KEY: json.dumps(stated)},
            "probabilities": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]},
        }
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


HALF = {"probabilities": np.array([0.5])}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a policy at all"),
        lambda path: save_file(HALF, path),
        lambda path: save_file(HALF, path, {METADATA_KEY: "{"}),
        lambda path: save_file(HALF, path, {METADATA_KEY: "[1]"}),
        lambda path: MixturePolicy([0.5, 0.5], 0.1).save(path),
        lambda path: write(path, HALF, schema=2),
        lambda path: write(path, HALF, settings={"floor": 1e-3}),
        lambda path: write(path, HALF, settings={"floor": "x", "cap": None}),
        lambda path: write(path, HALF, settings={"floor": 1e-3, "cap": [1]}),
        lambda path: write(path, {"means": np.array([0.5])}),
        lambda path: write(path, {"probabilities": np.array([np.nan])}),
        lambda path: write(path, {"probabilities": np.array([1.1])}),
        lambda path: write(path, {"probabilities": np.array([0.5], dtype=np.float32)}),
        lambda path: write(path, {"probabilities": np.array([[0.5]])}),
        lambda path: path.write_bytes(foreign_numbers("F8_E4M3", 1)),
        lambda path: path.write_bytes(foreign_numbers("BF16", 2)),
    ],
)
def test_foreign_and_corrupt_files_are_refused(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    spoil(path)
    with pytest.raises(CheckpointError, match=r"policy\.safetensors"):
        BernoulliPolicy.load(path)


@LAW
@given(st.data())
def test_a_truncated_or_flipped_file_never_ends_in_a_foreign_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("policy") / "policy.safetensors"
    BernoulliPolicy([0.25, 0.5]).save(path)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(content[:position])
        with pytest.raises(CheckpointError):
            BernoulliPolicy.load(path)
    else:
        content[position] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            BernoulliPolicy.load(path)


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        BernoulliPolicy([0.5]).save(tmp_path / "missing" / "policy")
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="cannot write"):
        BernoulliPolicy([0.5]).save(tmp_path / "taken")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]
