"""Rows without repetitions."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cads.estimators.design import distinct_rows


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=20))
def test_distinct_rows_keep_the_order_of_their_first_appearance(rows):
    result = [tuple(row) for row in distinct_rows([np.array(row) for row in rows])]
    assert result == list(dict.fromkeys(tuple(row) for row in rows))
