"""Random samples of a pool: drawn by id, nested, fair, and the same for a file that is sorted or shuffled."""

from __future__ import annotations

import numpy as np
import pytest

from cads.data.draws import draw, draw_by_source, draw_order
from cads.data.pool import Pool
from cads.data.subsample import numbered_by_first, subsample
from cads.data.token_batches import by_id, in_id_order
from cads.search.source_order import in_name_order


class Nothing:
    """Examples that nobody looks at; equal contents are copies."""

    def __init__(self, contents):
        self.contents = np.asarray(contents)

    def __len__(self):
        return len(self.contents)

    def digests(self):
        return [str(c).encode() for c in self.contents]


def pool_in(order, contents=None):
    """A pool of 300 examples of three sources, in this order of its rows; sources are numbered as they occur."""
    contents = np.arange(300) if contents is None else contents
    sources = np.repeat(["b", "c", "a"], [50, 100, 150])[order]
    names = list(dict.fromkeys(sources.tolist()))
    codes = np.array([names.index(s) for s in sources])
    return Pool([f"row-{i}" for i in order], Nothing(contents[order]), codes, names)


ORDERS = [np.arange(300), np.arange(300)[::-1], np.random.default_rng(0).permutation(300)]


def ids_of(pool, positions):
    return pool.ids.take(positions).to_pylist()


@pytest.mark.parametrize("order", ORDERS[1:])
def test_draws_do_not_depend_on_the_order_of_the_file(order):
    one, other = pool_in(ORDERS[0]), pool_in(order)
    assert ids_of(one, draw_order(one, 3)) == ids_of(other, draw_order(other, 3))
    drawn = [{p.source_names[p.sources[x[0]]]: ids_of(p, x) for x in draw_by_source(p, 20, 3)} for p in (one, other)]
    assert drawn[0] == drawn[1]
    assert ids_of(one, by_id(one)) == ids_of(other, by_id(other)) == sorted(one.ids.to_pylist())
    assert ids_of(other, in_id_order(other, order[:50])) == sorted(ids_of(other, order[:50]))


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("copies", [1, 4])
def test_a_share_of_each_source_does_not_depend_on_the_order_of_the_file(order, copies):
    contents = np.arange(300) // copies
    one, other = pool_in(ORDERS[0], contents), pool_in(order, contents)
    for share in (0.05, 0.3, 1.0):
        assert set(ids_of(one, subsample(one, share, 1))) == set(ids_of(other, subsample(other, share, 1)))


def test_draws_are_nested_and_as_many_as_asked():
    pool = pool_in(ORDERS[0])
    assert [len(draw(pool, count, 0)) for count in (0, 10, 300, 999)] == [0, 10, 300, 300]
    assert (draw(pool, 10, 0) == draw(pool, 40, 0)[:10]).all()
    assert [len(x) for x in draw_by_source(pool, 60, 0)] == [50, 60, 60]
    assert [set(pool.sources[x]) for x in draw_by_source(pool, 60, 0)] == [{0}, {1}, {2}]
    without = Pool(pool.ids, pool.examples)
    assert [len(x) for x in draw_by_source(without, 60, 0)] == [60]
    assert not np.array_equal(draw(pool, 40, 0), draw(pool, 40, 1))


def test_an_example_that_is_added_moves_no_other():
    pool = pool_in(ORDERS[0])
    smaller = Pool(pool.ids[:-1], Nothing(np.arange(299)))
    others = [i for i in ids_of(pool, draw_order(pool, 0)) if i != "row-299"]
    assert others == ids_of(smaller, draw_order(smaller, 0))


def test_every_part_of_a_file_is_drawn_alike():
    """The first half of a file is as often drawn as the second."""
    pool = pool_in(ORDERS[0])
    share = np.mean([(draw(pool, 30, seed) < 150).mean() for seed in range(60)])
    assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(60 * 30)


def test_codes_are_numbered_as_they_occur():
    assert numbered_by_first(np.array([7, 7, 2, 9, 2, 7])).tolist() == [0, 0, 1, 2, 1, 0]


def test_searches_number_sources_by_name(features):
    task = features()
    assert in_name_order(task) is task
    pool = task.pool
    order = [2, 0, 3, 1]
    names = [pool.source_names[i] for i in order]
    codes = np.argsort(order)[pool.sources]
    task.pool = Pool(pool.ids, pool.examples, codes, names)
    ordered = in_name_order(task).pool
    assert ordered.source_names == tuple(sorted(names))
    assert (np.array(ordered.source_names)[ordered.sources] == np.array(names)[codes]).all()
    assert ordered.content_hash == pool.content_hash != task.pool.content_hash
    assert in_name_order(task).pool is ordered
