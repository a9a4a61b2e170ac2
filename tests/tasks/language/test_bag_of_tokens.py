"""Texts as shares of their tokens."""

import numpy as np
import pytest

from cads.tasks.language.bag_of_tokens import N_BUCKETS, sharing_flops, token_shares
from cads.tasks.language.tokens import tokens_of
from tests.support.language_tasks import language_task, write_language


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokens_of(language_task(write_language(tmp_path_factory.mktemp("language"))).pool)


def test_shares_are_those_of_each_text(tokens):
    positions = np.array([3, 0, 3, len(tokens) - 1])
    shares = token_shares(tokens, positions)
    assert shares.shape == (4, N_BUCKETS)
    assert shares.dtype == np.float32
    for position, row in zip(positions, shares, strict=True):
        ids = tokens.ids[tokens.offsets[position] : tokens.offsets[position + 1]]
        np.testing.assert_allclose(row, np.bincount(ids % N_BUCKETS, minlength=N_BUCKETS) / len(ids), rtol=1e-6)


def test_ids_beyond_the_buckets_share_one(tokens):
    moved = token_shares(tokens, np.arange(5))
    tokens_elsewhere = tokens.take(np.arange(5))
    tokens_elsewhere.ids[:] += 2 * N_BUCKETS
    np.testing.assert_array_equal(token_shares(tokens_elsewhere, np.arange(5)), moved)


def test_flops_are_one_a_token_and_one_a_bucket(tokens):
    assert sharing_flops(tokens) == len(tokens.ids) / len(tokens) + N_BUCKETS
