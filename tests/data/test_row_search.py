"""Rows of data sets of other libraries: the same examples, whichever way the files of the pool are loaded."""

import csv
import datetime
import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, concatenate_datasets, load_dataset

from cads.data.origin import FileOrigin, file_digest, join_origins, row_hashes
from cads.data.row_search import DatasetReader, find_rows
from cads.data.weighted_rows import take_rows
from cads.errors import SelectionError

COLUMNS = ("prompt", "response", "day")
SIZES = {"a": 1500, "b": 700}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def rows_of(name, n):
    """Texts of which some look like numbers and dates."""
    return [{"prompt": f"{name}: {i}?", "response": str(i % 7), "day": f"2024-01-{i % 28 + 1:02d}"} for i in range(n)]


def record(name, rows, id_column=None):
    digest = file_digest(row_hashes([[row[c] for row in rows] for c in COLUMNS]))
    return FileOrigin(f"{name}.jsonl", len(rows), COLUMNS, digest, id_column)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    for name, n in SIZES.items():
        rows = rows_of(name, n)
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with (path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return path


class Pool:
    """Four fifths of the rows of two files, of which a third is selected."""

    def __init__(self, id_column=None):
        rng = np.random.default_rng(0)
        parts = {name: np.sort(rng.permutation(n)[: n * 4 // 5]) for name, n in SIZES.items()}
        self.origin = join_origins([(record(n, rows_of(n, SIZES[n]), id_column), rows) for n, rows in parts.items()])
        self.ids = pa.array([f"{name}-{i}" for name, rows in parts.items() for i in rows])
        self.selected = rng.random(len(self.ids)) < 1 / 3

    def prompts(self, *names):
        chosen = zip(self.origin.file, self.origin.row, self.selected, strict=True)
        return sorted(f"{'ab'[f]}: {r}?" for f, r, is_selected in chosen if is_selected and "ab"[f] in names)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("names", ["a", "b", "ab", "ba"])
def test_files_without_ids_give_the_selected_rows_each_alone_or_all_in_any_order(folder, names, kind, streaming):
    pool = Pool()
    files = [str(folder / f"{name}.{kind}") for name in names]
    reader = {"jsonl": "json", "csv": "csv"}[kind]
    dataset = load_dataset(reader, data_files=files, split="train", streaming=streaming)
    result = find_rows(dataset, pool.ids, pool.selected, pool.origin)
    rows = list(take_rows(dataset, result, result.examples.astype(float)))
    assert sorted(row["prompt"] for row in rows) == pool.prompts(*names)
    for row in rows:
        example = int(row["weight"])
        assert row["prompt"] == f"{'ab'[pool.origin.file[example]]}: {pool.origin.row[example]}?"
    assert result.absent == tuple(f"{name}.jsonl" for name in "ab" if name not in names)


def test_workers_of_a_loader_share_the_rows_of_a_stream_and_none_comes_twice(folder):
    from torch.utils.data import DataLoader

    pool = Pool()
    files = [str(folder / f"{name}.jsonl") for name in "ab"]
    stream = load_dataset("json", data_files=files, split="train", streaming=True)
    chosen = take_rows(stream, find_rows(stream, pool.ids, pool.selected, pool.origin))
    loader = DataLoader(chosen.select_columns(["prompt"]), batch_size=None, num_workers=2)
    assert sorted(row["prompt"] for row in loader) == pool.prompts("a", "b")


@pytest.mark.parametrize("change", ["shuffled", "filtered", "changed", "one more", "twice"])
def test_other_rows_are_refused_without_ids(folder, change):
    pool, rows = Pool(), rows_of("a", SIZES["a"])
    changed = {
        "shuffled": rows[::-1],
        "filtered": rows[1:],
        "changed": [{**rows[0], "response": "other"}, *rows[1:]],
        "one more": [{**rows[0], "prompt": "new"}, *rows],
        "twice": [*rows, *rows],
    }[change]
    with pytest.raises(SelectionError, match=r"none of the files.*a\.jsonl, b\.jsonl.*id_column"):
        find_rows(Dataset.from_list(changed), pool.ids, pool.selected, pool.origin)


def test_files_of_equal_contents_are_refused_unless_all_are_there():
    rows = rows_of("a", 10)
    one, two = record("one", rows), record("two", rows)
    origin = join_origins([(one, np.arange(10)), (two, np.arange(10))])
    ids = pa.array([f"x{i}" for i in range(20)])
    selected = np.arange(20) < 3
    with pytest.raises(SelectionError, match=r"one\.jsonl and two\.jsonl have the same contents"):
        find_rows(Dataset.from_list(rows), ids, selected, origin)
    assert find_rows(Dataset.from_list(rows + rows), ids, selected, origin).rows.tolist() == [0, 1, 2]


def with_ids(name, rows, keep=None):
    return [{**row, "id": f"{name}-{i}"} for i, row in enumerate(rows) if keep is None or i % keep == 0]


@pytest.mark.parametrize("streaming", [False, True])
def test_shuffled_or_changed_rows_are_found_by_their_ids(streaming, caplog):
    pool = Pool("id")
    rows = [{**row, "prompt": row["prompt"].upper()} for row in with_ids("a", rows_of("a", SIZES["a"]))]
    dataset = Dataset.from_list(rows).shuffle(seed=1)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    result = find_rows(dataset, pool.ids, pool.selected, pool.origin)
    chosen = list(take_rows(dataset, result))
    assert sorted(row["prompt"].lower() for row in chosen) == pool.prompts("a")
    assert [row["id"] for row in chosen] == pool.ids.take(pa.array(result.examples)).to_pylist()
    assert result.absent == ("b.jsonl",)
    assert "found by their ids, whatever their contents" in caplog.text


def test_a_file_of_which_some_ids_are_missing_is_refused():
    pool = Pool("id")
    part = Dataset.from_list(with_ids("a", rows_of("a", SIZES["a"]), keep=2))
    with pytest.raises(SelectionError, match="selected ids are not in column 'id'"):
        find_rows(part, pool.ids, pool.selected, pool.origin)


def test_rows_without_ids_are_not_lost_beside_rows_with_ids():
    pool = Pool("id")
    a, b = with_ids("a", rows_of("a", SIZES["a"])), rows_of("b", SIZES["b"])
    both = concatenate_datasets([Dataset.from_list(a), Dataset.from_list(b)])
    assert sorted(both.select(find_rows(both, pool.ids, pool.selected, pool.origin).rows)["prompt"]) == pool.prompts(
        *"ab"
    )
    changed = both.map(lambda row: {"prompt": row["prompt"] + "!"})
    with pytest.raises(SelectionError, match="selected ids are not in column 'id'"):
        find_rows(changed, pool.ids, pool.selected, pool.origin)


def test_an_id_on_two_rows_is_refused():
    ids, selected = pa.array(["a", "b"]), np.array([True, False])
    with pytest.raises(SelectionError, match=r"1 selected ids stand on several rows of column 'id'.*'a'"):
        find_rows(Dataset.from_dict({"id": ["a", "b", "a"]}), ids, selected, None)
    assert find_rows(Dataset.from_dict({"id": ["b", "a", "b", None]}), ids, selected, None).rows.tolist() == [1]


class Column:
    """A data set of one column with values of any types, in one shard."""

    column_names = ("id",)

    def __init__(self, values):
        self.values = values

    def with_format(self, _):
        return self

    def select_columns(self, _):
        return self

    def iter(self, batch_size):
        yield {"id": self.values}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None, 3], ["1", None, "3"]),
        ([None, None], [None, None]),
        ([1, "a"], ["1", "a"]),
        ([2**70, -1], [str(2**70), "-1"]),
        ([2**63], [str(2**63)]),
        (["007", ""], ["007", ""]),
        ([], []),
    ],
)
def test_ids_are_as_python_writes_them(values, expected):
    ids = DatasetReader(Column(values)).ids("id")
    assert ids.type == pa.string()
    assert ids.to_pylist() == expected


@pytest.mark.parametrize(
    "values", [[1.5, 2.0], [["a"], ["b"]], [True, False], [1, True], [b"a"], [datetime.date(2024, 1, 5)], [1, 2.5]]
)
def test_ids_that_are_neither_text_nor_whole_numbers_are_refused(values):
    with pytest.raises(SelectionError, match="name a column of strings or whole numbers"):
        find_rows(Column(values), pa.array(["a"]), np.array([True]), None)


def test_what_is_no_data_set_is_refused():
    for data, message in (
        (datasets.DatasetDict({"train": Dataset.from_dict({"id": ["a"]})}), r"holds the splits \['train'\]"),
        ([{"id": "a"}], "a list has no rows to choose"),
        ("a.jsonl", "a str has no rows to choose"),
    ):
        with pytest.raises(SelectionError, match=message):
            find_rows(data, pa.array(["a"]), np.array([True]), None)


def test_a_stream_that_changes_after_it_was_read_is_refused():
    calls = []

    def rows():
        calls.append(1)
        yield from ({"id": str(i)} for i in (range(5) if len(calls) == 1 else range(4, -1, -1)))

    class Stream:
        """Gives its rows in another order the second time."""

        column_names = ("id",)
        features = None

        def with_format(self, _):
            return self

        def select_columns(self, _):
            return self

        def iter(self, batch_size):
            yield {"id": [row["id"] for row in rows()]}

    from cads.data.weighted_rows import _chosen_rows

    stream = Stream()
    result = find_rows(stream, pa.array([str(i) for i in range(5)]), np.arange(5) < 2, None)
    with pytest.raises(SelectionError, match="not what it was before"):
        list(_chosen_rows(stream, result, None))
