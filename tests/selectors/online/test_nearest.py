"""Texts that are of the target's kind."""

import numpy as np
import pytest

from cads.selectors.online.nearest import LEVEL, MOST, NEIGHBOURS, Nearness, nearness_flops, youden

N_TOKENS = 400


def texts(rng, n, topic, length=60):
    """Shares of tokens of `n` texts, most of them from a topic: a hundred tokens."""
    tokens = np.where(rng.random((n, length)) < 0.8, 100 * topic + rng.integers(0, 100, (n, length)), 0)
    tokens = np.where(tokens == 0, rng.integers(0, N_TOKENS, (n, length)), tokens)
    counts = np.stack([np.bincount(row, minlength=N_TOKENS) for row in tokens])
    return (counts / length).astype(np.float32)


def none_unlike(pool):
    return np.zeros(len(pool), dtype=bool)


def test_texts_of_the_target_pass_but_for_the_level():
    """A false alarm for `LEVEL` of the texts that come from where the target comes from, on average."""
    rng, passed = np.random.default_rng(0), []
    for _ in range(20):
        pool = np.concatenate([texts(rng, 50, topic) for topic in range(4)])
        nearness = Nearness(texts(rng, 100, 1), pool, np.repeat(np.arange(4), 50) != 1)
        passed.append(nearness.passes(texts(rng, 200, 1)).mean())
    assert np.mean(passed) == pytest.approx(1 - LEVEL, abs=0.03)


def test_texts_of_other_topics_do_not_pass():
    rng = np.random.default_rng(1)
    pool = np.concatenate([texts(rng, 50, topic) for topic in range(4)])
    nearness = Nearness(texts(rng, 60, 2), pool, none_unlike(pool))
    for topic in (0, 1, 3):
        assert nearness.passes(texts(rng, 100, topic)).mean() < 0.02


@pytest.mark.parametrize("mistaken", [0.0, 0.2])
def test_a_minority_of_the_target_does_not_let_everything_pass(mistaken):
    """One in ten is of another topic. Nor does it matter if some of the unlike texts are of the target's kind."""
    rng, of_kind, others = np.random.default_rng(4), [], []
    for _ in range(10):
        target = np.concatenate([texts(rng, 54, 2), texts(rng, 6, 3)])
        pool = np.concatenate([texts(rng, 100, topic) for topic in range(4)])
        topics = np.repeat(np.arange(4), 100)
        lenient = Nearness(target, pool, none_unlike(pool))
        strict = Nearness(target, pool, (topics != 2) | (rng.random(400) < mistaken))
        assert strict.least > lenient.least
        of_kind.append(strict.passes(texts(rng, 200, 2)).mean())
        others.append(strict.passes(texts(rng, 200, 0)).mean())
    assert np.mean(of_kind) > 0.9
    assert np.mean(others) < 0.02


def test_the_threshold_tells_apart_best():
    """Against all thresholds."""
    rng = np.random.default_rng(5)
    own, others = rng.normal(1, 1, 80), rng.normal(0, 1, 120)
    least = float(np.quantile(own, LEVEL))

    def told(threshold):
        return (own >= threshold).mean() - (others >= threshold).mean()

    found = youden(own, others, least)
    assert told(found) == pytest.approx(max(told(x) for x in [least, *own[own > least]]))
    assert youden(own, others - 100, least) == least


def test_nearness_is_the_cosine_with_the_kth_nearest():
    """Against all pairs, one after another."""
    rng = np.random.default_rng(2)
    target, pool, others = (texts(rng, n, 1) for n in (30, 40, 12))
    both = np.concatenate([target, pool])
    rarity = np.log((1 + len(both)) / (1 + (both > 0).sum(axis=0)))

    def cosine(one, other):
        x, y = np.sqrt(one) * rarity, np.sqrt(other) * rarity
        return x @ y / np.sqrt(x @ x) / np.sqrt(y @ y)

    k = round(NEIGHBOURS * len(target))
    own = [sorted((cosine(x, y) for j, y in enumerate(target) if j != i), reverse=True) for i, x in enumerate(target)]
    nearness = Nearness(target, pool, none_unlike(pool))
    assert nearness.least == pytest.approx(np.quantile([row[k - 1] for row in own], LEVEL))
    expected = [sorted((cosine(x, y) for y in target), reverse=True)[k - 1] >= nearness.least for x in others]
    assert nearness.passes(others).tolist() == expected


def test_what_shares_nothing_with_the_target_does_not_pass():
    """A few texts of the target that are like none of the rest let the threshold fall to 0."""
    target, other = np.zeros((20, N_TOKENS), np.float32), np.zeros((4, N_TOKENS), np.float32)
    target[:17, 0] = 1
    target[np.arange(17, 20), np.arange(1, 4)] = 1
    other[:, 300] = 1
    nearness = Nearness(target, other, none_unlike(other))
    assert nearness.least == 0
    assert not nearness.passes(other).any()
    assert nearness.passes(target[:17]).all()


def test_no_text_is_no_text():
    rng = np.random.default_rng(3)
    nearness = Nearness(texts(rng, 2, 1), texts(rng, 5, 1), np.zeros(5, dtype=bool))
    assert nearness.passes(np.empty((0, N_TOKENS), np.float32)).shape == (0,)


def test_cost_is_that_of_the_pairs():
    assert nearness_flops(1000, 20, 50.0) == 50 * (4 + 2 * 20) * 1020
    assert nearness_flops(1000, 10**6, 50.0) == 50 * (4 + 2 * MOST) * (1000 + MOST)
