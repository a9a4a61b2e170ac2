"""Files as tables: what is read is what is written, and what cannot be read is refused with the remedy."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.errors import DataError
from cads.tasks.language import text_files, written_json
from cads.tasks.language.tables import guess_of, read_file, stem_of, text_column
from cads.tasks.language.written_json import DECODER, JsonType, as_rows, table_of


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def written(folder, name, content):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(folder, name, content):
    return read_file(written(folder, name, content)).to_pylist()


UNEVEN = [{"text": "a"}, {"text": "b", "input": "c"}, {"id": "d", "source": "s"}]
FILLED = [{"text": None, "input": None, "id": None, "source": None} | row for row in UNEVEN]


class TestAllRowsDecideTheColumns:
    @pytest.mark.parametrize("n", [1, 2, 1000])
    def test_whatever_the_first_row_has(self, tmp_path, monkeypatch, n):
        monkeypatch.setattr(written_json, "ROWS_IN_BLOCK", n)
        assert rows_of(tmp_path, "a.json", json.dumps(UNEVEN)) == FILLED
        assert rows_of(tmp_path, "a.jsonl", lines(UNEVEN)) == FILLED
        assert rows_of(tmp_path, "b.json", "".join(json.dumps(row, indent=2) for row in UNEVEN)) == FILLED

    def test_keys_of_lists_and_objects_stay_their_own(self, tmp_path):
        turns = [{"role": "user", "content": "2020-01-01"}, {"role": "assistant", "content": [{"type": "text"}]}]
        rows = [{"m": turns}, {"m": [{"role": "user", "weight": 0, "x": None}]}, {"m": {}}, {"m": "text"}, {"m": 1.50}]
        expected = [*rows[:4], {"m": "1.5"}]
        assert rows_of(tmp_path, "a.jsonl", lines(rows)) == expected
        assert rows_of(tmp_path, "a.json", json.dumps(rows)) == expected

    @settings(deadline=None)
    @given(
        st.lists(
            st.dictionaries(
                st.sampled_from("abc"),
                st.none() | st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.integers(), max_size=2),
            ),
            max_size=8,
        ),
        st.integers(1, 4),
    )
    def test_for_any_rows(self, rows, size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(written_json, "ROWS_IN_BLOCK", size)
            result = table_of(rows).to_pylist()
        names = {name for row in rows for name in row}
        assert result == ([dict.fromkeys(names) | row for row in rows] if names else [])


AS_WRITTEN = [
    "2020-01-01",
    "2020-01-01T00:00:00Z",
    "9223372036854775808",
    "18446744073709551616",
    "007",
    "1e5",
    "1.50",
    "NaN",
    "null",
    "true",
    " x ",
    "NA",
]


class TestValuesAreReadAsWritten:
    @pytest.mark.parametrize("text", AS_WRITTEN)
    def test_text_is_text_whatever_it_looks_like(self, tmp_path, text):
        row = {"id": text, "source": text, "text": text}
        header = ",".join(row)
        assert rows_of(tmp_path, "a.json", json.dumps([row])) == [row]
        assert rows_of(tmp_path, "a.jsonl", lines([row])) == [row]
        assert rows_of(tmp_path, "a.csv", f"{header}\n{text},{text},{text}\n") == [row]
        assert rows_of(tmp_path, "a.tsv", f"{header}\n{text},{text},{text}\n".replace(",", "\t")) == [row]
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        assert read_file(tmp_path / "a.parquet").to_pylist() == [row]

    def test_numbers_keep_their_digits(self, tmp_path):
        numbers = ["1", "-0.50", "9223372036854775808", "123456789012345678901234567890", "1e5", "1.10"]
        content = "".join(f'{{"id": {n}}}\n' for n in numbers)
        assert [row["id"] for row in rows_of(tmp_path, "a.jsonl", content)] == numbers
        listed = "[" + ",".join(f'{{"id": {n}}}' for n in numbers) + "]"
        assert [row["id"] for row in rows_of(tmp_path, "a.json", listed)] == numbers

    def test_numbers_within_lists_stay_numbers(self):
        assert table_of([DECODER.decode('{"x": [{"weight": 0, "share": 0.50, "on": true}]}')]).to_pylist() == [
            {"x": [{"weight": 0, "share": 0.5, "on": True}]}
        ]

    def test_a_mixed_column_leaves_the_file_readable(self, tmp_path):
        rows = [{"text": "a", "other": x} for x in (1, "b", None, True, [1], {"c": 2}, 1.25)]
        result = rows_of(tmp_path, "a.jsonl", lines(rows))
        assert [row["other"] for row in result] == ["1", "b", None, "true", [1], {"c": 2}, "1.25"]
        assert [row["text"] for row in result] == ["a"] * len(rows)

    def test_missing_numbers_of_pandas_are_missing(self, tmp_path):
        assert rows_of(tmp_path, "a.jsonl", '{"text": "a", "input": NaN}') == [{"text": "a", "input": None}]

    @pytest.mark.parametrize(
        ("column", "expected"),
        [
            (pa.array([2**63, 1], pa.uint64()), ["9223372036854775808", "1"]),
            (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
            (pa.array([1, 2]).dictionary_encode(), ["1", "2"]),
            (pa.array([True, None]), ["true", None]),
            (pa.array([b"a", b"b"]), ["a", "b"]),
            (pa.array([b"a"], pa.large_binary()), ["a"]),
            (pa.nulls(2), [None, None]),
            (pa.array([1.0, 2.5]), ["1", "2.5"]),
            (pa.array([uuid.UUID(int=1).bytes], pa.uuid()), [str(uuid.UUID(int=1))]),
            (pa.array([[1]]), [[1]]),
            (pa.array([{"a": 1}]), [{"a": 1}]),
        ],
    )
    def test_columns_with_types_become_text(self, column, expected):
        assert text_column(pa.chunked_array([column])).to_pylist() == expected

    def test_json_of_datasets_is_decoded_at_any_depth(self):
        texts = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', "[2]"]))
        listed = pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), texts)
        objects = pa.StructArray.from_arrays([pa.array(["x", '{"y']), texts], ["plain", "json"])
        assert text_column(pa.chunked_array([texts])).to_pylist() == [{"a": 1}, [2]]
        assert text_column(pa.chunked_array([listed])).to_pylist() == [[{"a": 1}, [2]]]
        assert text_column(pa.chunked_array([objects])).to_pylist() == [
            {"plain": "x", "json": {"a": 1}},
            {"plain": '{"y', "json": [2]},
        ]

    def test_keys_without_a_value_stay_where_they_are_written_and_not_where_arrow_adds_them(self):
        rows = [{"m": [{"a": None, "b": [None]}]}, {"m": {"c": 1}}, {"m": None}, {"m": "text"}]
        assert as_rows(table_of(rows)) == rows
        structs = pa.table({"m": [[{"a": 1}, {"b": [None]}], None], "n": [{"x": {"y": None}}, {"x": {"y": 2}}]})
        assert as_rows(structs) == [{"m": [{"a": 1}, {"b": [None]}], "n": {"x": {}}}, {"m": None, "n": {"x": {"y": 2}}}]

    def test_a_column_of_lists_is_one_column_however_it_is_cut(self):
        table = table_of([{"x": [i]} for i in range(5)])
        assert isinstance(table.schema.field("x").type, JsonType)
        assert table.slice(1, 3)["x"].to_pylist() == [[1], [2], [3]]
        batch = pa.concat_tables([table, table]).to_batches()[0]
        assert batch.take(pa.array([0, 4])).to_pylist() == [{"x": [0]}, {"x": [4]}]


SMALL = [{"text": "café 日本", "id": "1"}, {"text": 'a "b", c', "id": "2"}]
CSV = 'text,id\ncafé 日本,1\n"a ""b"", c",2\n'


class TestFormsOfFiles:
    @pytest.mark.parametrize(
        ("suffix", "compress"),
        [
            ("", bytes),
            (".gz", gzip.compress),
            (".zst", lambda x: pa.compress(x, "zstd", asbytes=True)),
            (".bz2", bz2.compress),
            (".xz", lzma.compress),
        ],
    )
    def test_compressed_or_not(self, tmp_path, suffix, compress):
        for name, content in (
            ("a.jsonl", lines(SMALL)),
            ("a.ndjson", lines(SMALL)),
            ("a.json", json.dumps(SMALL)),
            ("a.csv", CSV),
            ("A.CSV", CSV),
        ):
            assert rows_of(tmp_path, name + suffix, compress(content.encode())) == SMALL
            # Browsers and tools change names without changing contents.
            assert rows_of(tmp_path, name, compress(content.encode())) == SMALL
            assert rows_of(tmp_path, name + ".gz", content) == SMALL

    def test_parts_that_were_joined_after_compression(self, tmp_path):
        content = b"".join(gzip.compress(lines([row]).encode()) for row in SMALL)
        assert rows_of(tmp_path, "a.jsonl.gz", content) == SMALL

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    def test_a_byte_order_mark_says_the_encoding(self, tmp_path, encoding):
        assert rows_of(tmp_path, "a.json", json.dumps(SMALL, ensure_ascii=False).encode(encoding)) == SMALL
        assert rows_of(tmp_path, "a.jsonl", lines(SMALL).encode(encoding)) == SMALL
        assert rows_of(tmp_path, "a.csv", CSV.encode(encoding)) == SMALL

    def test_line_ends_and_blank_lines(self, tmp_path):
        assert rows_of(tmp_path, "a.jsonl", "\n\n" + lines(SMALL).replace("\n", "\r\n\r\n")) == SMALL
        assert rows_of(tmp_path, "a.csv", "\n" + CSV.replace("\n", "\r\n\r\n")) == SMALL

    def test_tabs(self, tmp_path):
        assert rows_of(tmp_path, "a.tsv", 'text\tid\ncafé 日本\t1\n"a ""b"", c"\t2\n') == SMALL

    def test_quotes_that_do_not_fit_are_text_in_tab_separated_files_which_is_a_guess(self, tmp_path):
        content = 'text\tid\n"Hello" she said\t1\n"open\t2\n""\t3\n'
        path = written(tmp_path, "a.tsv", content)
        values = [line.split("\t") for line in content.splitlines()[1:]]
        assert read_file(path).to_pylist() == [{"text": text, "id": i} for text, i in values]
        assert "double quotes are read as text, as they do not fit quoted values (line 2: " in guess_of(read_file(path))
        assert guess_of(read_file(written(tmp_path, "b.tsv", 'text\tid\n"a ""b"", c"\t2\n'))) is None

    def test_values_may_be_nested(self, tmp_path):
        (row,) = rows_of(tmp_path, "a.jsonl", nested(200))
        assert json.dumps(row) == nested(200)

    def test_values_with_line_breaks_and_of_any_length(self, tmp_path):
        long = "x" * 300_000
        assert rows_of(tmp_path, "a.csv", f'text,id\n"a\nb",1\n{long},2\n') == [
            {"text": "a\nb", "id": "1"},
            {"text": long, "id": "2"},
        ]
        assert csv.field_size_limit() < 300_000

    def test_arrow_files_and_streams(self, tmp_path):
        table = pa.Table.from_pylist(SMALL)
        for name, opened in (
            ("a.arrow", pa.ipc.new_file),
            ("b.arrow", pa.ipc.new_stream),
            ("c.feather", pa.ipc.new_file),
        ):
            with opened(str(tmp_path / name), table.schema) as file:
                file.write_table(table)
            assert read_file(tmp_path / name).to_pylist() == SMALL

    @pytest.mark.parametrize(
        ("name", "stem"),
        [("a/x.jsonl", "x"), ("x.jsonl.gz", "x"), ("x.CSV.ZST", "x"), ("v1.5.json", "v1.5"), ("folder", "folder")],
    )
    def test_the_stem_has_no_suffix(self, tmp_path, name, stem):
        assert stem_of(tmp_path / name) == stem


def nested(depth):
    """An object with lists within each other, with a bracket in a text besides."""
    return '{"a": ' + "[" * depth + '"["' + "]" * depth + "}"


LATIN = "text\n" + "fine\n" * 3000 + "café\n"


class TestWhatCannotBeReadIsRefusedWithTheRemedy:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", '{"text": "café"}'.encode("latin-1"), r"not UTF-8: line 1 .*0xe9.*write it as UTF-8.*iconv"),
            ("a.csv", LATIN.encode("latin-1"), r"not UTF-8: line 3002 .*0xe9.*iconv"),
            ("a.tsv", LATIN.encode("latin-1"), r"not UTF-8: line 3002"),
            ("a.jsonl.gz", gzip.compress('{"text": "é"}'.encode("latin-1"), mtime=0), r"not UTF-8: line 1"),
            ("a.jsonl", '{"a": 1}'.encode("utf-16-le"), "zero bytes.*write it as UTF-8"),
            ("a.jsonl", b'\xff\xfe{"a": 1}x', "not UTF-8|not in the encoding"),
            ("a.csv", "a,b,a\n1,2,3\n", r"names \['a'\] more than once: rename"),
            ("a.csv", "a,b\n1\n", "line 2 has 1 values and the header 2"),
            ("a.csv", "a,b\n1,2,3\n", "line 2 has 3 values and the header 2"),
            ("a.csv", 'a,b\n"1,2\n', "cannot be read: line 2: unexpected end.*ends with one"),
            ("a.tsv", 'a\tb\n"Hello" she said\n', "line 2: .*holds others twice"),
            ("a.tsv", '"a"\tb\n"Hello" she said\tok\n', "line 2: .*holds others twice"),
            ("a.tsv", b'a\tb\n"Hi" she\tok\n\xe9\tok\n', "not UTF-8: line 3"),
            ("a.csv", "a;b\n1;2\n", r"'a;b', with ';' in it: values are separated by commas"),
            ("a.csv", "a\tb\n1\t2\n", "separated by commas in a .csv, and by tabs in a .tsv"),
            ("a.tsv", "a,b\n1,2\n", "separated by commas in a .csv, and by tabs in a .tsv"),
            ("a.jsonl", '{"a": 1}\n{"a": }\n', "line 2 is no JSON .*one object a line, or one list"),
            ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is no JSON object"),
            ("a.jsonl", "[1]\n[2]\n", "more than objects: give one object a line"),
            ("a.jsonl", '{"a": 1, "a": 2}', r"keys \['a'\] more than once"),
            ("a.json", '[{"a": 1}, {"a": 1, "b": {"c": 1, "c": 2}}]', r"keys \['c'\] more than once"),
            ("a.json", '[{"a": 1}, 2]', "every entry of the list must be an object"),
            ("a.json", '[{"a": 1},', "is no JSON .*line 1"),
            ("a.json", '{"version": 1, "data": [{"q": 1}, {"q": 2}]}', "seem to be the list 'data': give that list"),
            ("a.json", json.dumps({"version": 1, "data": [{"q": 1}]}, indent=1), "seem to be the list 'data'"),
            ("a.json", '{"a": {"0": "x"}, "b": {"0": "y"}}', r"as pandas writes: use to_json\(orient='records'"),
            ("a.json", '{"a": ["x", "y"], "b": ["z", "w"]}', "a list for each column"),
            ("a.jsonl", '{"a": "x"}\n{"a": "\\ud800"}', "'a' of row 1 .*surrogate"),
            ("a.jsonl", '{"a": "x"}\n{"a": {"\\ud800": 1}}', "'a' of row 1 .*surrogate.*repair it"),
            ("a.jsonl", '{"a": "x"}\n{"\\ud800": 1}', r"the key '\\ud800' of row 1 .*surrogate.*repair it"),
            ("a.jsonl", "\n" + "[" * 100_000, "what begins on line 2 is nested more than 200 deep: flatten it"),
            ("a.jsonl", '{"a": 1}\n{"a": ' + "[" * 100_000, "line 2 is nested more than 200 deep: flatten it"),
            ("a.jsonl", '{"a": 1}\n' + nested(300), "'a' of row 1 .* is nested more than 200 deep: flatten it"),
            ("a.jsonl.gz", gzip.compress(lines(SMALL * 1000).encode(), mtime=0)[:-20], "cannot be read: .*runcated"),
            ("a.csv.xz", lzma.compress(CSV.encode() * 1000)[:-20], "cannot be read: .*ended before"),
            ("a.jsonl.zst", pa.compress(lines(SMALL * 1000).encode(), "zstd", asbytes=True)[:-20], "cannot be read"),
            ("a.parquet.gz", b"", "is a compressed .parquet file: decompress it"),
            ("a.parquet", b"PAR1", "cannot be read"),
            ("a.arrow", b"ARROW1", "cannot be read"),
            ("a.feather", b"", "cannot be read"),
            ("a.xlsx", b"PK", r"suffix '.xlsx': use one of .json, .*may be compressed"),
            ("a.gz", b"", "suffix ''"),
        ],
    )
    def test_files(self, tmp_path, name, content, message):
        with pytest.raises(DataError, match=message) as caught:
            read_file(written(tmp_path, name, content))
        assert name in str(caught.value)

    def test_two_columns_of_one_name_in_any_format(self, tmp_path):
        pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"columns \['a'\] more than once: rename"):
            read_file(tmp_path / "a.parquet")

    def test_the_line_is_named_in_what_is_compressed(self, tmp_path):
        path = written(tmp_path, "a.csv.gz", gzip.compress(LATIN.encode("latin-1")))
        assert "line 3002" in text_files.not_utf8(path)
