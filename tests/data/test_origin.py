"""Where examples were read: rows are told apart by contents, whichever reader they come from."""

import datetime
import json

import numpy as np
import pytest

from cads.data.origin import FileOrigin, Origin, file_digest, join_origins, row_hashes
from cads.errors import DataError


def file(name="a.jsonl", rows=5, digest="x"):
    return FileOrigin(name, rows, ("prompt", "response"), digest, "id")


@pytest.mark.parametrize(
    "equal",
    [
        ["5", 5, 5.0, "05", "5.0"],
        ["9223372036854775808", 2**63],
        ["", None, float("nan"), "NA"],
        ["2024-01-05", datetime.date(2024, 1, 5), datetime.datetime(2024, 1, 5)],
        ["true", True, "True"],
        [[{"role": "user", "content": "hi", "tool": None}], '[{"content": "hi", "role": "user"}]'],
        ["text", b"text"],
    ],
)
def test_what_readers_take_for_different_types_is_equal(equal):
    assert len(set(row_hashes([equal]).tolist())) == 1


def test_rows_of_different_contents_differ():
    texts = ["a", "A", "a ", "", "5", "6", "-5", "5 apples", "[1, 2]", "[1, 2", "[1, 3]", "2024-01-05", "2024-01-06"]
    assert len(set(row_hashes([texts]).tolist())) == len(texts)
    assert row_hashes([["ab"], ["c"]])[0] != row_hashes([["a"], ["bc"]])[0]


def test_the_digest_of_a_file_depends_on_the_order_of_its_rows():
    hashes = row_hashes([["a", "b"]])
    assert file_digest(hashes) == file_digest(hashes.copy())
    assert file_digest(hashes) != file_digest(hashes[::-1])


def test_files_are_joined_in_order_and_a_file_of_two_parts_is_one():
    a, b = file("a"), file("b")
    origin = join_origins([(a, np.array([0, 4])), (b, np.array([3])), (a, np.array([2]))])
    assert origin.files == (a, b)
    assert origin.file.tolist() == [0, 0, 1, 0]
    assert origin.row.tolist() == [0, 4, 3, 2]
    assert origin.take(np.array([2, 0])).row.tolist() == [3, 0]
    assert join_origins([(a, np.array([0])), (None, np.array([1]))]) is None


def test_a_file_that_is_read_twice_for_the_same_rows_is_its_own_copy():
    a = file("a")
    origin = join_origins([(a, np.array([0, 1])), (a, np.array([1, 2]))])
    assert origin.files == (a, a)
    assert origin.file.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("codes", "rows"), [([0, 0], [1, 1]), ([1], [0]), ([-1], [0]), ([0], [5]), ([0], [-1]), ([0, 0], [1])]
)
def test_rows_that_no_file_can_have_are_refused(codes, rows):
    with pytest.raises(DataError):
        Origin((file(),), np.array(codes, dtype=np.int32), np.array(rows, dtype=np.int64))


def test_a_digest_is_computed_once_and_only_when_it_is_needed():
    calls = []

    def compute():
        calls.append(1)
        return "x"

    late = file(digest=compute)
    assert late != file("b")
    assert join_origins([(late, np.array([0])), (late, np.array([1]))]).files == (late,)
    assert not calls
    assert late == file(digest="x") != file(digest="y")
    assert late.to_json() == file(digest="x").to_json()
    assert calls == [1]


def test_a_record_comes_back_from_json_and_wrong_types_are_refused():
    record = file()
    fields = json.loads(json.dumps(record.to_json()))
    assert FileOrigin.from_json(fields) == record
    for change in (
        {"rows": -1},
        {"rows": True},
        {"rows": 10**400},
        {"columns": "ab"},
        {"location": 3},
        {"digest": None},
    ):
        with pytest.raises(DataError):
            FileOrigin.from_json({**fields, **change})
