"""The files of a Selection: what is written is read back, and what is corrupt is refused."""

import contextlib
import json
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cads.accounting.ledger import SELECT
from cads.data.origin import FileOrigin, file_digest, join_origins, row_hashes
from cads.data.pool import Pool
from cads.errors import SelectionError
from cads.runtime.safe_read import JSON_LIMIT
from cads.selection import Selection
from cads.selection_files import COLUMNS
from tests.support.selections import chosen, small_task

ANYWHERE = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def task():
    return small_task()


@pytest.fixture
def saved(task, tmp_path):
    return chosen(task.pool).save(tmp_path / "run" / "selection")


class TestRoundTrip:
    def test_everything_comes_back(self, task, saved):
        before, after = chosen(task.pool), Selection.load(saved)
        assert after.table().equals(before.table())
        assert after._header() == before._header()
        assert after.ledger.total(SELECT).flops == 123.0
        assert after.budget == before.budget

    def test_loads_from_the_run_folder_too(self, saved):
        assert Selection.load(saved.parent).method == "made-up"

    @pytest.mark.parametrize("name", ["seed=0", "a b", "selection.json", "π"])
    def test_any_folder_name(self, task, tmp_path, name):
        folder = tmp_path / name / "selection"
        chosen(task.pool).save(folder)
        assert Selection.load(folder).table().equals(chosen(task.pool).table())

    def test_writes_the_documented_files_and_columns(self, saved):
        assert sorted(f.name for f in saved.iterdir()) == ["scores.parquet", "selection.json", "timings.json"]
        assert [f.name for f in saved.parent.iterdir()] == ["selection"]
        assert pq.read_schema(saved / "scores.parquet").names == list(COLUMNS)
        assert "seconds" not in (saved / "selection.json").read_text()
        assert json.loads((saved / "timings.json").read_text())[0]["seconds"] == 0.25

    def test_without_sources(self, task, tmp_path):
        pool = Pool(task.pool.ids, task.pool.examples)
        loaded = Selection.load(chosen(pool).save(tmp_path / "s"))
        assert loaded.sources is None
        assert [row[0] for row in loaded.source_counts()] == ["(all)"]

    def test_a_failed_save_leaves_nothing(self, task, tmp_path):
        with pytest.raises(TypeError):
            chosen(task.pool, notes={"not json": object()}).save(tmp_path / "s")
        assert list(tmp_path.iterdir()) == []


class TestSavingOver:
    def test_an_earlier_selection_is_replaced(self, task, saved):
        chosen(task.pool, seed=4).save(saved)
        assert Selection.load(saved).seed == 4
        assert [f.name for f in saved.parent.iterdir()] == ["selection"]

    def test_an_empty_folder_is_used(self, task, tmp_path):
        assert Selection.load(chosen(task.pool).save(tmp_path)).seed == 3

    @pytest.mark.parametrize("with_selection", [False, True])
    def test_a_foreign_folder_is_refused(self, task, tmp_path, with_selection):
        folder = tmp_path / "mine"
        if with_selection:
            chosen(task.pool).save(folder)
        folder.mkdir(exist_ok=True)
        (folder / "thesis.tex").write_text("years of work")
        with pytest.raises(SelectionError, match=r"thesis\.tex.*choose another"):
            chosen(task.pool).save(folder)
        assert (folder / "thesis.tex").read_text() == "years of work"

    def test_a_file_is_refused(self, task, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(SelectionError, match="no folder"):
            chosen(task.pool).save(tmp_path / "file")


class TestOrigin:
    @pytest.fixture
    def pool(self, task):
        """The examples of a pool as the even rows of two files, which have no ids."""
        texts = [f"text {i}" for i in range(160)]
        files = [texts[:60], texts[60:]]
        records = [
            FileOrigin(f"{k}.jsonl", len(f), ("text",), file_digest(row_hashes([f]))) for k, f in enumerate(files)
        ]
        origin = join_origins([(record, np.arange(0, len(f), 2)) for record, f in zip(records, files, strict=True)])
        return Pool(task.pool.ids, task.pool.examples, task.pool.sources, task.pool.source_names, origin=origin)

    def test_it_comes_back_and_finds_the_rows_of_each_file_without_ids(self, pool, tmp_path):
        before = chosen(pool)
        after = Selection.load(before.save(tmp_path / "s"))
        assert after.origin.files == before.origin.files
        assert (after.origin.row == before.origin.row).all()
        texts = [f"text {i}" for i in range(160)]
        for begin, end in ((0, 160), (0, 60), (60, 160)):
            applied = after.apply(datasets.Dataset.from_dict({"text": texts[begin:end]}))["text"]
            assert applied == [f"text {i}" for i in range(begin, end) if i % 2 == 0 and (i // 2) % 3 == 0]

    def test_resampled_files_together_are_the_resampled_whole(self, pool):
        selection = chosen(pool, weighted=True)
        texts = [f"text {i}" for i in range(160)]
        together, *parts = (
            selection.apply(datasets.Dataset.from_dict({"text": part}), weights="resample", seed=3)["text"]
            for part in (texts, texts[:60], texts[60:])
        )
        assert [*parts[0], *parts[1]] == list(together)
        assert len(together) == 27

    def test_the_hash_of_a_selection_does_not_depend_on_where_its_files_are(self, pool):
        moved = replace(pool.origin, files=tuple(replace(f, location=f"/x/{f.location}") for f in pool.origin.files))
        assert chosen(pool).content_hash == replace(chosen(pool), origin=moved).content_hash

    def test_a_selection_without_it_loads(self, task, tmp_path):
        folder = chosen(task.pool).save(tmp_path / "s")
        assert "files" not in json.loads((folder / "selection.json").read_text())
        assert Selection.load(folder).origin is None

    @pytest.mark.parametrize("how", ["missing", "short", "beyond", "null", "no list", "no rows", "twice"])
    def test_what_is_damaged_is_refused(self, pool, tmp_path, how):
        folder = chosen(pool).save(tmp_path / "s")
        file = folder / "rows.parquet"
        table = pq.read_table(file)
        row = table["row"].to_pylist()
        if how == "missing":
            file.unlink()
        elif how == "short":
            pq.write_table(table.slice(1), file)
        elif how in ("beyond", "null", "twice"):
            first = {"beyond": 10**6, "null": None, "twice": row[1]}[how]
            pq.write_table(table.set_column(1, "row", pa.array([first, *row[1:]], pa.int64())), file)
        elif how == "no list":
            rewrite(folder, lambda h: h.update(files=3))
        else:
            rewrite(folder, lambda h: h["files"][0].pop("rows") and None)
        with pytest.raises(SelectionError):
            Selection.load(folder)


def rewrite(folder, change):
    """Change selection.json as a dict, or replace it by what `change` returns."""
    file = folder / "selection.json"
    header = json.loads(file.read_text())
    file.write_text(json.dumps(change(header) or header))


def rewrite_scores(folder, change):
    file = folder / "scores.parquet"
    pq.write_table(change(pq.ParquetFile(file).read()), file)


COLUMN_FIELDS = {name: pa.field(name, kind) for name, kind in COLUMNS.items()}


def with_first(name, value):
    """Scores with the first value of a column replaced."""

    def change(table):
        values = [value, *table[name].to_pylist()[1:]]
        i = table.schema.get_field_index(name)
        return table.set_column(i, COLUMN_FIELDS[name], pa.array(values, COLUMNS[name]))

    return change


def huge(folder):
    with (folder / "selection.json").open("ab") as file:
        file.truncate(JSON_LIMIT + 1)


CORRUPTIONS = {
    "no folder": shutil.rmtree,
    "no scores": lambda f: (f / "scores.parquet").unlink(),
    "no header": lambda f: (f / "selection.json").unlink(),
    "scores are a folder": lambda f: ((f / "scores.parquet").unlink(), (f / "scores.parquet").mkdir()),
    "scores are empty": lambda f: (f / "scores.parquet").write_bytes(b""),
    "scores are text": lambda f: (f / "scores.parquet").write_text("id,score\n"),
    "header is huge": huge,
    "header is empty": lambda f: (f / "selection.json").write_text(""),
    "header is no JSON": lambda f: (f / "selection.json").write_text("{"),
    "header is no text": lambda f: (f / "selection.json").write_bytes(b"\xff\xfe\x00"),
    "header is nested too deep": lambda f: (f / "selection.json").write_text("[" * 200_000),
    "header is a list": lambda f: (f / "selection.json").write_text("[1]"),
    "header is null": lambda f: (f / "selection.json").write_text("null"),
    "other version": lambda f: rewrite(f, lambda h: h.update(schema_version=99)),
    "no version": lambda f: rewrite(f, lambda h: h.pop("schema_version") and None),
    "column missing": lambda f: rewrite_scores(f, lambda t: t.drop_columns(["rank"])),
    "column added": lambda f: rewrite_scores(f, lambda t: t.append_column("x", pa.array(range(len(t))))),
    "columns renamed": lambda f: rewrite_scores(f, lambda t: t.rename_columns(list("abcdef"))),
    "column of another type": lambda f: rewrite_scores(
        f, lambda t: t.set_column(2, "score", pc.cast(t["score"], pa.string()))
    ),
    "row missing": lambda f: rewrite_scores(f, lambda t: t.slice(1)),
    "no rows": lambda f: rewrite_scores(f, lambda t: t.slice(0, 0)),
    "NaN score": lambda f: rewrite_scores(f, with_first("score", float("nan"))),
    "infinite score": lambda f: rewrite_scores(f, with_first("score", float("inf"))),
    "score missing": lambda f: rewrite_scores(f, with_first("score", None)),
    "probability of 2": lambda f: rewrite_scores(f, with_first("probability", 2.0)),
    "id missing": lambda f: rewrite_scores(f, with_first("id", None)),
    "selected missing": lambda f: rewrite_scores(f, with_first("selected", None)),
    "selected changed": lambda f: rewrite_scores(f, with_first("selected", False)),
    "id twice": lambda f: rewrite_scores(f, lambda t: with_first("id", t["id"][1].as_py())(t)),
}


@pytest.mark.parametrize("how", CORRUPTIONS)
def test_corrupt_is_refused(saved, how):
    CORRUPTIONS[how](saved)
    with pytest.raises(SelectionError):
        Selection.load(saved)


def test_nothing_selected_is_refused_on_disk(saved):
    rewrite_scores(saved, lambda t: t.set_column(5, "selected", pa.array([False] * len(t))))
    rewrite(saved, lambda h: h["counts"].update(selected=0))
    with pytest.raises(SelectionError, match="selected no example"):
        Selection.load(saved)


RIGHT_TYPES = {
    "method": str,
    "pool_hash": str,
    "weighted": bool,
    "config": dict,
    "versions": dict,
    "source_probability": dict,
    "notes": dict,
    "seed": int,
    "budget": (),
    "ledger": (),
    "counts": (),
}
VALUES = [None, 1.5, True, "text", [1], {"x": [None]}, 10**400]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, right in RIGHT_TYPES.items()
        for value in VALUES
        if not isinstance(value, right) or (value is True and right is int)
    ],
)
def test_wrong_types_in_the_header_are_refused(saved, name, value):
    rewrite(saved, lambda h: h.update({name: value}))
    with pytest.raises(SelectionError):
        Selection.load(saved)


@pytest.mark.parametrize("name", RIGHT_TYPES)
def test_a_header_without_a_field_is_refused(saved, name):
    rewrite(saved, lambda h: h.pop(name) and None)
    with pytest.raises(SelectionError):
        Selection.load(saved)


@pytest.mark.parametrize("value", [None, True, "0.5", [0.5], -0.1, 1.1, float("nan"), float("inf"), 10**400])
def test_wrong_target_fraction_is_refused(saved, value):
    rewrite(saved, lambda h: h.update(target_fraction=value))
    with pytest.raises(SelectionError):
        Selection.load(saved)


@ANYWHERE
@given(data=st.data())
def test_truncated_or_flipped_bytes_never_end_in_a_foreign_error(task, tmp_path, data):
    folder = chosen(task.pool).save(tmp_path / "s")
    file = folder / data.draw(st.sampled_from(["selection.json", "scores.parquet"]))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    with contextlib.suppress(SelectionError):
        Selection.load(folder)


@ANYWHERE
@given(where=st.floats(0, 0.999))
def test_truncated_scores_are_refused(task, tmp_path, where):
    folder = chosen(task.pool).save(tmp_path / "s")
    content = (folder / "scores.parquet").read_bytes()
    (folder / "scores.parquet").write_bytes(content[: int(where * len(content))])
    with pytest.raises(SelectionError):
        Selection.load(folder)
