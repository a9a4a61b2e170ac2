"""The median of numbers that are read in pieces is that of numpy, bit by bit."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.scoring.order_statistics import median, order_statistic

NUMBERS = st.lists(
    st.floats(allow_nan=False, allow_infinity=False, width=64, min_value=-1e300, max_value=1e300),
    min_size=1,
    max_size=40,
)


@settings(deadline=None, max_examples=15)
@given(NUMBERS, st.integers(1, 9), st.data())
def test_they_are_those_of_the_sorted_numbers(numbers, size, data):
    values = np.array(numbers)

    def passes():
        return (values[start : start + size] for start in range(0, len(values), size))

    position = data.draw(st.integers(0, len(values) - 1))
    assert order_statistic(passes, position) == np.sort(values)[position]
    assert median(passes, len(values)) == np.median(values)
