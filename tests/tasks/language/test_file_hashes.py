"""Hashes of files: they are computed late, and are those of the files as they were read."""

from __future__ import annotations

import logging
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from cads.data.origin import UNKNOWN, file_digest, join_origins, row_hashes
from cads.data.row_search import find_rows
from cads.errors import SelectionError
from cads.tasks.language import file_hashes
from cads.tasks.language.rows import TextSource, load_rows
from tests.support.tiny_llama import write_lines

ROWS = [{"prompt": f"q{i}", "response": f"a{i}", "other": i} for i in range(23)]
PAIRS = [{name: row[name] for name in ("prompt", "response")} for row in ROWS]


def file_of(folder, kind):
    if kind == "jsonl":
        return write_lines(folder / "a.jsonl", ROWS)
    if kind == "folder":
        Dataset.from_list(ROWS).save_to_disk(str(folder / "a"))
        return folder / "a"
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    return folder / "a.parquet"


@pytest.fixture
def few_at_once(monkeypatch):
    monkeypatch.setattr(file_hashes, "ROWS_AT_ONCE", 7)


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_a_file_is_hashed_when_its_digest_is_asked_for(tmp_path, monkeypatch, kind, limit):
    hashed = []

    def counting(columns):
        result = row_hashes(columns)
        hashed.append(len(result))
        return result

    monkeypatch.setattr(file_hashes, "row_hashes", counting)
    origin = load_rows(TextSource(path=str(file_of(tmp_path, kind)), limit=limit), 0).origin
    assert not hashed
    assert origin.digest == file_digest(row_hashes([[row[name] for row in PAIRS] for name in PAIRS[0]]))
    assert origin.digest == origin.to_json()["digest"]
    assert hashed == [7, 7, 7, 2]


def test_a_path_is_that_of_the_time_of_reading(tmp_path, monkeypatch):
    file_of(tmp_path, "jsonl")
    monkeypatch.chdir(tmp_path)
    origin = load_rows(TextSource(path="a.jsonl"), 0).origin
    monkeypatch.chdir("/")
    assert origin.digest != UNKNOWN
    assert origin.location == "a.jsonl"


def removed(path):
    path.unlink()


def changed(path):
    write_lines(path, [{**ROWS[0], "response": "other"}, *ROWS[1:]])


def damaged(path):
    path.write_text("{")


def touched(path):
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("change", [removed, changed, damaged, touched])
def test_a_file_that_is_no_longer_what_was_read_has_the_digest_of_none(tmp_path, caplog, change):
    path = file_of(tmp_path, "jsonl")
    origin = load_rows(TextSource(path=str(path)), 0).origin
    change(path)
    assert origin.digest == UNKNOWN
    assert f"{path} was removed or changed after it was read" in caplog.text


def test_its_rows_are_found_by_their_ids_only(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_lines(tmp_path / "a.jsonl", [{**row, "id": f"x{i}"} for i, row in enumerate(PAIRS)])
    rows = load_rows(TextSource(path=str(path)), 0)
    changed(path)
    selected = np.arange(len(rows)) < 3
    origin = join_origins([(rows.origin, rows.file_rows)])
    with_ids = Dataset.from_dict({"id": rows.ids.to_pylist()[::-1]})
    assert find_rows(with_ids, rows.ids, selected, origin).rows.tolist() == [20, 21, 22]
    with pytest.raises(SelectionError, match="none of the files that the pool was read from"):
        find_rows(Dataset.from_list(PAIRS), rows.ids, selected, origin)


def test_how_a_file_is_read_by_a_guess_is_said_once(tmp_path, caplog):
    path = tmp_path / "a.tsv"
    path.write_text('prompt\tresponse\n"Hello" she said\tok\n')
    rows = load_rows(TextSource(path=str(path)), 0)
    assert rows.table["prompt"].to_pylist() == ['"Hello" she said']
    assert rows.origin.digest == file_digest(row_hashes([['"Hello" she said'], ["ok"]]))
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert ["its double quotes are read as text" in said for said in warnings] == [True]
