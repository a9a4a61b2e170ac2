"""The capped simplex of a large pool."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from cads.policies import simplex
from cads.policies.bernoulli import BernoulliPolicy
from cads.policies.simplex import project_capped_simplex


class TestPolicy:
    @pytest.mark.parametrize("block", [1, 7, 64])
    def test_blocks_change_nothing_but_the_order_of_sums(self, monkeypatch, block):
        rng = np.random.default_rng(0)
        s = np.concatenate([[0.0, 1.0], project_capped_simplex(rng.random(58), 20.0)])
        at_once = BernoulliPolicy(s, cap=25.0)
        masks = at_once.sample(3, np.random.default_rng(1))
        gradient = rng.normal(size=60)
        log_prob, score, entropy = at_once.log_prob(masks), at_once.score(masks), at_once.entropy()
        at_once.step(gradient, 0.3)
        monkeypatch.setattr(simplex, "BLOCK", block)
        parts = BernoulliPolicy(s, cap=25.0)
        assert (parts.sample(3, np.random.default_rng(1)) == masks).all()
        assert (parts.score(masks) == score).all()
        assert parts.log_prob(masks) == pytest.approx(log_prob, rel=1e-12)
        assert parts.entropy() == pytest.approx(entropy, rel=1e-12)
        parts.step(gradient, 0.3)
        assert parts.probabilities == pytest.approx(at_once.probabilities, abs=1e-12)

    def test_an_update_takes_less_than_40_bytes_an_example(self):
        n, rng = 400_000, np.random.default_rng(0)
        moved = BernoulliPolicy(project_capped_simplex(rng.random(n), 0.3 * n), cap=0.3 * n)
        tracemalloc.start()
        masks = moved.sample(1, rng)
        moved.log_prob(masks)
        moved.step(moved.score(masks)[0], 1e-3)
        extra = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert extra / n < 40

    def test_what_is_projected_is_left_as_it_was(self):
        s = np.array([0.5, 2.0, -1.0])
        project_capped_simplex(s, 1.0)
        assert s.tolist() == [0.5, 2.0, -1.0]
