"""The losses of examples from logits and labels are those of the task."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cads.errors import ConfigError
from cads.integrations.example_losses import answer_columns, example_losses
from tests.support.language_tasks import sharpened
from tests.support.other_trainers import digits_task, sums_task, write_sums


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return sums_task(write_sums(tmp_path_factory.mktemp("sums")))


class TestSequences:
    def test_they_are_those_of_the_task_to_the_last_bit(self, task):
        model = sharpened(task.model(0))
        batch = task.pool.batch(np.arange(13))
        logits = model(input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"]).logits
        assert torch.equal(example_losses(logits, batch.labels), task.losses(model, batch))

    @given(rows=st.lists(st.lists(st.integers(0, 79), min_size=1, max_size=9), min_size=1, max_size=4))
    def test_the_columns_of_answers_are_those_of_batches(self, task, rows):
        batch = task.pool.batch(np.array([i for row in rows for i in row]))
        assert torch.equal(answer_columns(batch.labels), batch.inputs["answers"])

    def test_the_first_token_and_rows_without_answers_have_no_loss(self):
        labels = torch.tensor([[5, -100, -100], [-100, 2, -100]])
        losses = example_losses(torch.zeros(2, 3, 7), labels)
        torch.testing.assert_close(losses, torch.tensor([0.0, float(np.log(7))]))


def test_those_of_classes_are_those_of_the_task_to_the_last_bit():
    task = digits_task()
    model, batch = task.model(0), task.pool.batch(np.arange(9))
    assert torch.equal(example_losses(task.logits(model, batch), batch.labels), task.losses(model, batch))


@pytest.mark.parametrize("labels", [None, torch.zeros(3), torch.zeros(3, 2, 2, dtype=torch.int64)])
def test_other_labels_are_refused_with_the_remedy(labels):
    with pytest.raises(ConfigError, match="give `losses`"):
        example_losses(torch.zeros(3, 5), labels)
