"""Pool and target as one: the examples of a step and its price are those of `cads train`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cads.data.training_batches import collated
from cads.errors import ConfigError
from cads.integrations.joint_examples import JointExamples
from cads.tasks.language.tokens import tokens_of
from tests.support.other_trainers import digits_task, sums_task, write_sums

ROWS = st.tuples(
    st.lists(st.integers(0, 79), min_size=0, max_size=6), st.lists(st.integers(0, 15), min_size=1, max_size=6)
)


@pytest.fixture(scope="module", params=["sums", "digits"])
def task(request, tmp_path_factory):
    return digits_task() if request.param == "digits" else sums_task(write_sums(tmp_path_factory.mktemp("sums")))


@pytest.fixture(scope="module")
def examples(task):
    return JointExamples(task)


@given(rows=ROWS)
def test_a_step_in_one_batch_is_that_of_cads_train(task, examples, rows):
    pool_rows, target_rows = (np.array(x, dtype=np.int64) for x in rows)
    numbers = examples.numbers((pool_rows, target_rows))
    (theirs,) = collated((task.pool, pool_rows), (task.target, target_rows))
    ours = examples.batch(numbers)
    assert torch.equal(ours.labels, theirs.labels)
    for name, x in theirs.inputs.items():
        assert torch.equal(ours.inputs[name], x), name
    price = examples.price(numbers, len(numbers))
    assert price.usage == task.costs.usage(theirs)
    assert price.forward == task.costs.forward(theirs)
    assert (price.tokens, price.answer_tokens) == (theirs.tokens, theirs.answer_tokens)
    assert examples.ids(numbers) == [
        i for pool, x in ((task.pool, pool_rows), (task.target, target_rows)) for i in pool.ids.take(x).to_pylist()
    ]


@given(rows=ROWS, size=st.integers(1, 12))
def test_micro_batches_cost_no_more_than_the_step_and_no_less_than_the_cheapest(task, examples, rows, size):
    numbers = examples.numbers(tuple(np.array(x, dtype=np.int64) for x in rows))
    price, whole = examples.price(numbers, size), examples.price(numbers, len(numbers))
    assert len(numbers) * examples.cheapest <= price.usage <= whole.usage
    assert price.answer_tokens == whole.answer_tokens


def test_packed_rows_are_refused(tmp_path):
    task = sums_task(write_sums(tmp_path))
    task.settings = replace(task.settings, trainer_compatible=None, packing=True)
    with pytest.raises(ConfigError, match="packing"):
        JointExamples(task)


def test_without_trainer_compatible_pool_and_target_are_apart(tmp_path):
    task = sums_task(write_sums(tmp_path))
    one, rows = tokens_of(task.pool), np.array([0])
    other = int(np.flatnonzero(tokens_of(task.target).lengths() != one.lengths()[0])[0])
    task.pool.examples = replace(one, joint=False)
    assert len(collated((task.pool, rows), (task.target, np.array([other])))) == 2
