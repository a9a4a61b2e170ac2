"""Selections of large pools."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.data.pool import Pool
from cads.errors import DataError, SelectionError
from cads.selection import Selection


class TestSelections:
    def made(self, sources):
        ids = pa.array(["c", "a", "b"])
        score = np.array([0.1, 0.9, 0.5])
        return Selection(ids, score, score, score > 0.3, "m", 0, Budget(1.0), Ledger(), "h", sources=sources)

    def test_sources_are_codes_and_come_back(self, tmp_path):
        selection = self.made(["x", "y", "x"])
        assert pa.types.is_dictionary(selection.sources.type)
        loaded = Selection.load(selection.save(tmp_path / "s"))
        assert loaded.sources.to_pylist() == ["x", "y", "x"]
        assert loaded.content_hash == selection.content_hash
        assert loaded.source_counts() == [("x", 2, 1, pytest.approx(0.3)), ("y", 1, 1, 0.9)]
        assert self.made(["x", "y", "y"]).content_hash != selection.content_hash

    def test_sources_of_another_length_are_refused(self):
        with pytest.raises(SelectionError, match="2 sources for 3"):
            self.made(["x", "y"])

    def test_ids_that_are_no_strings_are_refused(self, features):
        with pytest.raises(DataError, match="type int64"):
            Pool(pa.array([1, 2]), features().pool.examples.take(np.arange(2)))
