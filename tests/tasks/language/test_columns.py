"""Columns: shapes of data that are recognised whole, templates of columns, and columns that are not used."""

from __future__ import annotations

import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cads.errors import ConfigError, DataError
from cads.tasks.language.columns import _some_values, _texts
from cads.tasks.language.encoding import TokenEncoder
from cads.tasks.language.formats import Renderer
from cads.tasks.language.rows import TextSource, load_rows
from tests.support.tiny_llama import TEMPLATE, tokenizer, write_lines
from tests.support.token_caches import warnings_of


def source(tmp_path, rows, **options):
    return TextSource(path=str(write_lines(tmp_path / "rows.jsonl", rows)), **options)


def written(tmp_path, rows, *, template=None, **options):
    """What is not learned and what is, of each example."""
    tok = tokenizer(template)
    tokens, _ = TokenEncoder(tok, Renderer(tok), 1000).encode(load_rows(source(tmp_path, rows, **options), 0))
    result = []
    for begin, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        ids, mask = tokens.ids[begin:end], tokens.loss_mask[begin:end]
        result.append((tok.decode(ids[~mask]), tok.decode(ids[mask])))
    return result


SQUAD = {"title": "t", "context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}}
SHAPES = {
    "alpaca": ({"instruction": "i", "input": "x", "output": "o"}, ("i\n\nx\n", "o</s>")),
    "alpaca without input": ({"instruction": "i", "input": "", "output": "o"}, ("i\n", "o</s>")),
    "dolly": ({"instruction": "i", "context": "x", "response": "o", "category": "k"}, ("i\n\nx\n", "o</s>")),
    "squad": (SQUAD, ("q\n\nc\n", "a</s>")),
    "question, context and answer": ({"question": "q", "context": "c", "answer": "a"}, ("q\n\nc\n", "a</s>")),
    "flan": ({"inputs": "x", "targets": "y", "task": "t"}, ("x\n", "y</s>")),
    "orca": ({"system_prompt": "s", "question": "q", "response": "r"}, ("s\n\nq\n", "r</s>")),
    "history": (
        {"instruction": "i", "input": "", "output": "o", "system": "s", "history": [["a", "b"], ["c", "d"]]},
        ("s\n\na\nb\n\nc\nd\n\ni\n", "o</s>"),
    ),
    "metamath": ({"query": "q", "response": "r", "type": "t"}, ("q\n", "r</s>")),
    "competition mathematics": ({"problem": "p", "level": "1", "solution": "s", "answer": "a"}, ("p\n", "s</s>")),
    "capital letters": ({"Question": "q", "Context": "c", "Answer": "a"}, ("q\n\nc\n", "a</s>")),
    "numbers": ({"question": 7, "answer": 12}, ("7\n", "12</s>")),
}


class TestShapes:
    @pytest.mark.parametrize("name", SHAPES)
    def test_a_known_shape_is_read_whole(self, tmp_path, name):
        row, expected = SHAPES[name]
        assert written(tmp_path, [row]) == [expected]

    @pytest.mark.parametrize("name", [n for n in SHAPES if n != "numbers"])
    def test_also_from_parquet_and_where_the_format_is_named(self, tmp_path, name):
        row, expected = SHAPES[name]
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        tok = tokenizer(None)
        rows = load_rows(TextSource(path=str(tmp_path / "a.parquet"), format="prompt"), 0)
        tokens, _ = TokenEncoder(tok, Renderer(tok), 1000).encode(rows)
        assert tok.decode(tokens.ids) == "".join(expected)

    def test_system_and_history_are_turns_of_a_chat_and_not_learned(self, tmp_path):
        row = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["a", "b"]]}
        asked = "<|system|>s<|end|>\n<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|user|>i\n\nx<|end|>\n<|assistant|>"
        assert written(tmp_path, [row], template=TEMPLATE) == [(f"{asked}\n", "o<|end|>")]
        bare = {**row, "system": None, "history": []}
        expected = ("<|user|>i\n\nx<|end|>\n<|assistant|>\n", "o<|end|>")
        assert written(tmp_path, [bare], template=TEMPLATE) == [expected]

    def test_of_several_answers_the_first_is_learned_and_it_is_said(self, tmp_path, caplog):
        row = {"question": "q", "context": "c", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}
        assert written(tmp_path, [row, row]) == [("q\n\nc\n", "a</s>")] * 2
        assert (
            "the first of several responses is learned, the others are not used (2 examples, such as ['a',"
            in (warnings_of(caplog)[0])
        )

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            {"chosen": [{"role": "user", "content": "c"}], "rejected": [{"role": "user", "content": "r"}]},
        ],
    )
    def test_preference_pairs_are_refused(self, tmp_path, row):
        with pytest.raises(DataError, match=r"has preference pairs .*name it, such as columns: \{prompt: prompt"):
            load_rows(source(tmp_path, [row]), 0)

    def test_unless_one_of_them_is_named(self, tmp_path, caplog):
        row = {"prompt": "p", "chosen": "c", "rejected": "r"}
        assert written(tmp_path, [row], columns={"response": "chosen"}) == [("p\n", "c</s>")]
        assert "not used are rejected ('r')" in warnings_of(caplog)[0]


class TestTemplates:
    def test_a_role_may_be_made_of_columns(self, tmp_path, caplog):
        rows = [{"instruction": "i", "input": "x", "output": "o"}, {"instruction": "j", "output": "p"}]
        columns = {"prompt": "{instruction}\n{input} #", "response": "{output}."}
        assert written(tmp_path, rows, columns=columns) == [("i\nx #\n", "o.</s>"), ("j\n #\n", "p.</s>")]
        assert warnings_of(caplog) == []

    def test_ids_and_sources_too(self, tmp_path):
        rows = [{"text": "x", "set": "a", "n": 1, "source": "s"}, {"text": "y", "set": "a", "n": 2, "source": "t"}]
        columns = {"id": "{set}/{n}", "source": "{set}-{source}"}
        result = load_rows(source(tmp_path, rows, columns=columns), 0)
        assert result.ids.to_pylist() == ["a/1", "a/2"]
        assert result.sources.to_pylist() == ["a-s", "a-t"]

    def test_a_brace_is_written_twice(self, tmp_path):
        table = load_rows(source(tmp_path, [{"a": "x"}], columns={"text": "{{{a}}}"}), 0).table
        assert table["text"].to_pylist() == ["{x}"]

    def test_where_its_columns_are_empty_there_is_no_text(self, tmp_path):
        rows = [{"q": "1", "a": "2"}, {"q": "1", "a": " "}, {"q": "1", "a": None}]
        table = load_rows(source(tmp_path, rows, columns={"prompt": "q", "response": "so {a}"}), 0).table
        assert table["response"].to_pylist() == ["so 2", "", None]

    def test_a_column_of_that_very_name_is_a_column(self, tmp_path):
        rows = [{"{q}": "1", "q": "2", "a": "3"}]
        assert written(tmp_path, rows, columns={"prompt": "{q}", "response": "a"}) == [("1\n", "3</s>")]

    @pytest.mark.parametrize(
        ("columns", "error", "message"),
        [
            ({"text": "{absent}"}, DataError, r"has no columns \['absent'\]: it has \['q', 'a', 'l'\]"),
            ({"text": "{q"}, ConfigError, "cannot be read"),
            ({"text": "q}"}, ConfigError, "cannot be read"),
            ({"text": "{}"}, ConfigError, "needs the name of a column in each pair of braces"),
            ({"text": "{q!r}"}, ConfigError, "needs the name of a column in each pair of braces"),
            ({"text": "{q:>9}"}, ConfigError, "needs the name of a column in each pair of braces"),
            ({"text": "{{}}"}, ConfigError, "needs a column in braces"),
            ({"messages": "{q}"}, ConfigError, "a template gives text, and messages is none"),
            ({"text": "{l}"}, DataError, "column 'l' of .* in a template it must be text or numbers"),
        ],
    )
    def test_what_is_no_template_is_refused(self, tmp_path, columns, error, message):
        with pytest.raises(error, match=message):
            load_rows(source(tmp_path, [{"q": "1", "a": "2", "l": ["3"]}], columns=columns), 0)


class TestUnusedColumns:
    def test_they_are_named_once_with_three_values_each(self, tmp_path, caplog):
        rows = [
            {"prompt": "p", "response": "r", "topic": f"t{i // 2}", "level": i, "long": "x" * 99, "id": str(i)}
            for i in range(9)
        ]
        load_rows(source(tmp_path, rows), 0)
        (said,) = warnings_of(caplog)
        assert "not used are topic ('t0', 't1', 't2'); level ('0', '1', '2'); long ('xxx" in said
        assert "x" * 41 not in said

    def test_a_column_that_only_later_rows_have_is_one(self, tmp_path, caplog):
        load_rows(source(tmp_path, [{"text": "x"}, {"text": "y", "note": "n"}]), 0)
        assert "not used are note (None, 'n')" in warnings_of(caplog)[0]

    def test_named_columns_are_no_guess_and_the_others_are_said(self, tmp_path, caplog):
        row = {"question": "q", "context": "c", "answer": "a"}
        given = {"prompt": "question", "response": "answer"}
        assert written(tmp_path, [row], columns=given) == [("q\n", "a</s>")]
        assert "not used are context ('c')" in warnings_of(caplog)[0]
        written(tmp_path, [row], columns={**given, "context": "context"})
        assert warnings_of(caplog) == []

    def test_nothing_is_said_where_all_are_used(self, tmp_path, caplog):
        rows = [{"prompt": "p", "response": "r", "id": "i", "source": "s"}]
        with caplog.at_level(logging.WARNING):
            load_rows(source(tmp_path, rows), 0, given_sources=True)
        assert not caplog.records
        load_rows(source(tmp_path, rows), 0)
        assert "not used are source ('s')" in warnings_of(caplog)[0]


def test_values_that_python_has_none_for_are_shown(tmp_path):
    late = pa.array([253402300800, 0], pa.timestamp("s"))
    assert _some_values(pa.chunked_array([late]))[0].startswith("10000-01-01")
    long = pa.chunked_array([pa.array([[0.5] * 100_000, None]), pa.array([[]], pa.list_(pa.float64()))])
    assert _some_values(long) == ["[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5,", "None", "[]"]


def test_bytes_in_a_template_are_refused():
    table = pa.table({"instruction": pa.array([b"\xff"]), "output": ["a"]})
    with pytest.raises(DataError, match=r"'instruction'.*is binary and no text"):
        _texts(table, "instruction", "a.parquet")
