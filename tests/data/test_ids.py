"""The order of examples by id."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from cads.data.ids import id_order


@given(st.lists(st.text(), unique=True))
def test_it_names_the_same_examples_however_they_are_ordered(names):
    ordered = sorted(names, key=str.encode)
    for ids in (pa.array(names, pa.string()), pa.chunked_array([names[:2], names[2:]], pa.string())):
        assert ids.take(pa.array(id_order(ids))).to_pylist() == ordered
