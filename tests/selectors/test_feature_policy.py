"""A policy of features: its probabilities, its gradients against references, and files that are none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.special import expit

from cads.errors import CheckpointError, ConfigError
from cads.estimators.enumeration import enumerate_masks
from cads.selectors.cads_amortised.policy import (
    AmortisedPolicy,
    corrected_slope,
    mean_loss,
    mean_loss_slope,
    mirrored,
    penalty_direction,
)
from cads.selectors.cads_amortised.sample import Penalty, Sample


def random_policy(rng, features=2):
    shape = (features,)
    return AmortisedPolicy(
        tuple(f"feature {i}" for i in range(features)),
        rng.normal(size=shape),
        rng.uniform(0.5, 2, shape),
        rng.normal(size=shape),
        float(rng.normal()),
    )


class TestPolicy:
    def test_probabilities_are_the_formula(self):
        rng = np.random.default_rng(0)
        policy, x = random_policy(rng, 3), rng.normal(size=(50, 3))
        logits = torch.from_numpy((x - policy.centre) / policy.scale) @ torch.from_numpy(policy.weights) + policy.bias
        np.testing.assert_allclose(policy.probabilities(x), torch.sigmoid(logits).numpy(), rtol=1e-12)

    def test_the_gradient_of_the_penalty_in_w_is_autograds(self):
        rng = np.random.default_rng(1)
        policy, x, losses = random_policy(rng, 3), rng.normal(size=(40, 3)), rng.exponential(size=40)
        v = torch.from_numpy(policy.parameters).requires_grad_()
        s = torch.sigmoid(torch.from_numpy(policy.standardised(x)) @ v[:-1] + v[-1])
        mean = (s * torch.from_numpy(losses)).sum() / s.sum()
        mean.backward()
        assert mean_loss(policy, x, losses) == pytest.approx(mean.item(), rel=1e-12)
        np.testing.assert_allclose(mean_loss_slope(policy, x, losses), v.grad.numpy(), rtol=1e-9, atol=1e-12)

    def test_the_chain_rule_against_enumeration(self):
        """The gradient in v of E_m[F(m)] for any F, by autograd through the probability of each of 2^8 masks."""
        rng = np.random.default_rng(2)
        policy, x = random_policy(rng), rng.normal(size=(8, 2))
        masks, values = torch.from_numpy(enumerate_masks(8)), torch.from_numpy(rng.normal(size=256))
        s = torch.from_numpy(policy.probabilities(x)).requires_grad_()
        in_s = torch.autograd.grad((torch.where(masks, s, 1 - s).prod(dim=1) * values).sum(), s)[0]
        v = torch.from_numpy(policy.parameters).requires_grad_()
        s = torch.sigmoid(torch.from_numpy(policy.standardised(x)) @ v[:-1] + v[-1])
        in_v = torch.autograd.grad((torch.where(masks, s, 1 - s).prod(dim=1) * values).sum(), v)[0]
        np.testing.assert_allclose(policy.chain(x, in_s.numpy()), in_v.numpy(), rtol=1e-9, atol=1e-12)

    def test_the_direction_is_the_gradient_at_the_uniform_policy(self):
        rng = np.random.default_rng(3)
        x, signal = rng.normal(size=(200, 3)) * [1, 10, 0.1] + [0, 5, 1], rng.exponential(size=200)
        centre, scale, direction = penalty_direction(x, signal)
        uniform = AmortisedPolicy(("a", "b", "c"), centre, scale, np.zeros(3), 0.3)
        slope = mean_loss_slope(uniform, x, signal)[:-1]
        cosine = slope @ direction / np.linalg.norm(slope) / np.linalg.norm(direction)
        assert cosine == pytest.approx(1, abs=1e-9)

    def test_it_is_read_back_as_it_was(self, tmp_path):
        policy, x = random_policy(np.random.default_rng(4)), np.random.default_rng(5).normal(size=(9, 2))
        policy.save(tmp_path / "policy.json")
        np.testing.assert_array_equal(
            AmortisedPolicy.load(tmp_path / "policy.json").probabilities(x), policy.probabilities(x)
        )

    @pytest.mark.parametrize(
        "change",
        [
            {"schema_version": 2}, {"weights": [1.0]}, {"weights": "x"}, {"scale": [0.0, 1.0]}, {"bias": None},
            {"bias": float("nan")}, {"names": [1, 2]}, {"names": ["a", "a"]}, {"centre": [[1.0, 2.0]]},
        ],
        ids=str,
    )  # fmt: skip
    def test_what_is_no_policy_is_refused(self, tmp_path, change):
        record = random_policy(np.random.default_rng(4)).to_json() | change
        (tmp_path / "policy.json").write_text(json.dumps(record))
        with pytest.raises(CheckpointError, match=r"policy\.json"):
            AmortisedPolicy.load(tmp_path / "policy.json")

    @pytest.mark.parametrize("text", ["", "[]", "null", '{"schema_version": 1}', "[" * 100_000])
    def test_other_files_are_refused(self, tmp_path, text):
        (tmp_path / "policy.json").write_text(text)
        with pytest.raises(CheckpointError, match="no policy can be read"):
            AmortisedPolicy.load(tmp_path / "policy.json")
        with pytest.raises(CheckpointError, match="no policy can be read"):
            AmortisedPolicy.load(tmp_path / "missing.json")

    def test_other_columns_are_refused(self):
        with pytest.raises(ConfigError, match="one column for each"):
            random_policy(np.random.default_rng(0)).probabilities(np.zeros((4, 3)))


class TestCorrectedGradient:
    """F is any function of masks of 8 examples, J(mu) = E_v E_m[F(m)], v ~ N(mu, sigma^2), m ~ Bernoulli(s(v))."""

    @pytest.fixture
    def world(self):
        rng = np.random.default_rng(6)
        x, losses = rng.normal(size=(8, 1)), rng.exponential(size=8)
        policy = AmortisedPolicy(("x",), np.zeros(1), np.ones(1), np.array([0.7]), -0.2)
        masks = enumerate_masks(8)
        selected = np.maximum(masks.sum(axis=1), 1)
        values = 3 * (masks @ losses / selected) ** 2 + 0.3 * rng.normal(size=256)
        return policy, x, losses, masks, values

    @staticmethod
    def expected(policy, x, masks, values, v):
        s = policy.at(v).probabilities(x)
        return float(np.where(masks, s, 1 - s).prod(axis=1) @ values)

    def test_it_is_unbiased_against_enumeration(self, world):
        policy, x, losses, masks, values = world
        centre, sigma = policy.parameters, np.array([0.6, 0.4])
        nodes, widths = np.polynomial.hermite_e.hermegauss(24)
        grid = [(centre + sigma * [a, b], wa * wb / (2 * np.pi)) for a, wa in zip(nodes, widths, strict=True)
                for b, wb in zip(nodes, widths, strict=True)]  # fmt: skip
        truth = sum(w * self.expected(policy, x, masks, values, v) * (v - centre) / sigma**2 for v, w in grid)
        slope = sum(w * mean_loss_slope(policy.at(v), x, losses) for v, w in grid)
        rng, found = np.random.default_rng(7), {0.0: [], 3.0: []}
        for _ in range(1000):
            draws = mirrored(centre, sigma, 30, rng)
            s = expit(draws[:, :1] @ x.T + draws[:, 1:])
            f = values[(rng.random(s.shape) < s) @ 2 ** np.arange(8)]
            for c, estimates in found.items():
                held = c * (s @ losses) / s.sum(axis=1)
                estimates.append(corrected_slope(centre, sigma, draws, f, held, c * slope))
        for estimates in map(np.array, found.values()):
            error = estimates.std(axis=0) / np.sqrt(len(estimates))
            assert (np.abs(estimates.mean(axis=0) - truth) < 4 * error).all()
            assert (error < 0.15 * np.abs(truth).max()).all()
        # Where the penalty says all there is to say, nothing is left to chance.
        exact = corrected_slope(centre, sigma, draws, held, held, 3 * slope)
        np.testing.assert_allclose(exact, 3 * slope, rtol=1e-12)

    def test_a_constant_cancels_and_what_is_held_stays(self, world):
        policy, *_ = world
        sigma = np.array([0.5, 0.0])
        draws = mirrored(policy.parameters, sigma, 3, np.random.default_rng(0))
        assert (draws[:, 1] == policy.bias).all()
        np.testing.assert_allclose(draws[::2] + draws[1::2], 2 * policy.parameters[None].repeat(3, axis=0), rtol=1e-12)
        slope = corrected_slope(policy.parameters, sigma, draws, np.full(6, 1e6), np.zeros(6), np.array([0.3, 0.7]))
        np.testing.assert_allclose(slope, [0.3, 0.0], atol=1e-8)

    def test_the_penalty_is_fitted_to_what_was_tried(self):
        rng = np.random.default_rng(8)
        x, theta, u = rng.normal(size=(100, 2)), rng.exponential(size=100), rng.exponential(size=100)
        sample = Sample(np.arange(100), x, ("a", "b"), theta, u)
        policies = [random_policy(rng) for _ in range(400)]
        policies = [AmortisedPolicy(("a", "b"), np.zeros(2), np.ones(2), p.weights, p.bias) for p in policies]
        delta_objective = np.array([2 * mean_loss(p, x, theta) - mean_loss(p, x, u) for p in policies])
        penalty = Penalty.fitted(sample, policies, delta_objective)
        assert (penalty.c1, penalty.c2) == (pytest.approx(2, rel=0.05), pytest.approx(1, rel=0.1))
        v, nudge = policies[0].parameters, 1e-6
        numeric = [
            (penalty.value(policies[0].at(v + e)) - penalty.value(policies[0].at(v - e))) / (2 * nudge)
            for e in nudge * np.eye(3)
        ]
        np.testing.assert_allclose(penalty.slope(policies[0]), numeric, rtol=1e-4, atol=1e-8)
