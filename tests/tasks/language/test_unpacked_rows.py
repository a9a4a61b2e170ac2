"""transformers is told that rows hold one sequence each, where they do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import masking_utils

from cads.tasks.language.unpacked_rows import unpacked_rows


def test_packed_rows_are_found_outside_of_the_block():
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    for _ in range(2):
        with unpacked_rows():
            assert masking_utils.find_packed_sequence_indices(packed) is None
        assert masking_utils.find_packed_sequence_indices(packed).tolist() == [[0, 0, 0, 1, 1]]


def test_another_thread_is_not_told():
    packed = torch.tensor([[0, 1, 0, 1]])
    with unpacked_rows(), ThreadPoolExecutor(1) as thread:
        found = thread.submit(masking_utils.find_packed_sequence_indices, packed).result()
    assert found.tolist() == [[0, 0, 1, 1]]
