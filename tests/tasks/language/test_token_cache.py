"""Tokens that stay on disk: the same pools as in memory, made once, and found by what decides on them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.cli.main import main
from cads.errors import DataError
from cads.recipe import TrainConfig
from cads.study.grid import Setting
from cads.tasks.language import rows as rows_module
from cads.tasks.language import token_cache as token_cache_module
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.encoding import TokenEncoder
from cads.tasks.language.formats import Renderer
from cads.tasks.language.rows import Rows, TextSource, load_rows
from cads.tasks.language.token_cache import ARRAYS, MANIFEST, TokenCache, result_fields, rows_digest
from cads.tasks.language.tokens import tokens_of
from tests.support.tiny_llama import MARKED, conversations, model_folder, sums, tokenizer, write_lines
from tests.support.token_caches import entries, warnings_of

pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


def texts(n=40):
    """Of which the first has no answer token: its only token cannot be predicted."""
    return [{"text": "" if i == 0 else f"{i} " + "abc " * (i % 9)} for i in range(n)]


def in_memory_and_on_disk(tmp_path, model, pool, **options):
    """How the task is built in memory, with a cache that is empty, and with one that is not."""
    config = LanguageConfig(model=str(model), pool=pool, **options)
    cached = replace(config, token_cache=str(tmp_path / "cache"))
    return [partial(c.build, TrainConfig(batch_size=8)) for c in (config, cached, cached)]


def same(one, other):
    a, b = tokens_of(one), tokens_of(other)
    assert one.content_hash == other.content_hash
    assert one.ids == other.ids
    assert one.source_names == other.source_names
    for x, y in ((one.sources, other.sources), (a.subtasks, b.subtasks)):
        assert (x is None) == (y is None)
        assert x is None or np.array_equal(x, y)
    for name in ("ids", "loss_mask", "offsets", "answers"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        assert np.array_equal(x, y)
    assert (a.texts, a.pad, a.max_length, a.packed) == (b.texts, b.pad, b.max_length, b.packed)
    assert a.last_answers == b.last_answers
    rows = np.random.default_rng(0).integers(0, len(one), 9)
    x, y = one.batch(rows), other.batch(rows)
    assert torch.equal(x.labels, y.labels)
    assert all(torch.equal(x.inputs[k], y.inputs[k]) for k in x.inputs)


class TestTheSameAsInMemory:
    @pytest.mark.parametrize(
        ("rows", "options"),
        [
            (sums(60), {}),
            (sums(60), {"packing": True, "chat": False, "separator": "##", "max_tokens": 30, "drop": True}),
            (conversations(30), {"n_pool": 9}),
            (texts(), {"drop": True}),
            ([r if i % 4 else {**r, "response": ""} for i, r in enumerate(sums(40))], {"drop": True}),
        ],
    )
    def test_pools_and_what_is_said_of_them(self, tmp_path, model, caplog, rows, options):
        path = write_lines(tmp_path / "rows.jsonl", rows)
        ways = in_memory_and_on_disk(tmp_path, model, [TextSource(path=str(path))], **options)
        tasks, said = zip(*((build(), warnings_of(caplog)) for build in ways), strict=True)
        assert said[0] == said[1] == said[2]
        said_of_rows = [text for text in said[0] if "not used are" not in text]
        assert bool(said_of_rows) == (options.get("drop", False))
        for task in tasks[1:]:
            for name in ("pool", "target", "test"):
                same(getattr(tasks[0], name), getattr(task, name))
            assert task.identity == tasks[0].identity
            assert task.ends == tasks[0].ends
            assert task.longest_example == tasks[0].longest_example
            assert task.texts(task.target) == tasks[0].texts(tasks[0].target)

    def test_several_sources_of_which_some_lose_examples(self, tmp_path, model, caplog):
        files = [write_lines(tmp_path / f"{n}.jsonl", texts(20 + i)) for i, n in enumerate("xyz")]
        columns = {"subtask": "text"}
        pool = [TextSource(path=str(f), columns=columns) for f in files]
        ways = in_memory_and_on_disk(tmp_path, model, pool, n_test=3, drop=True, max_tokens=20)
        (memory, made, result), said = zip(*((build(), warnings_of(caplog)) for build in ways), strict=True)
        for task in (made, result):
            same(memory.pool, task.pool)
            same(memory.target, task.target)
        assert memory.pool.source_names == ("x", "y", "z")
        assert said[0] == said[1] == said[2]
        assert len([text for text in said[0] if "left out" in text]) == 3

    @pytest.mark.parametrize("template", [MARKED, None])
    def test_other_ways_to_write(self, tmp_path, template):
        rows = write_lines(tmp_path / "rows.jsonl", sums(20) if template is None else conversations(20))
        loaded = load_rows(TextSource(path=str(rows)), 0)
        tok = tokenizer(template)
        encoder = TokenEncoder(tok, Renderer(tok), 100)
        expected, _ = encoder.encode(loaded)
        for _ in range(2):
            (actual, _), cache = TokenCache(tmp_path / "cache", encoder).fetch([loaded]), tmp_path / "cache"
            assert np.array_equal(actual.ids, expected.ids)
            assert np.array_equal(actual.loss_mask, expected.loss_mask)
        assert len(list(cache.iterdir())) == 1

    def test_what_is_refused_is_refused_alike_and_leaves_nothing(self, tmp_path, model):
        rows = [{"id": "short", "prompt": "q", "response": "a"}, {"id": "endless", "prompt": "q" * 50, "response": "a"}]
        rows += [{"id": f"more-{i}", "prompt": "q", "response": "a"} for i in range(20)]
        pool = [TextSource(path=str(write_lines(tmp_path / "a.jsonl", rows)))]
        config = LanguageConfig(model=str(model), pool=pool, max_tokens=45, n_test=1, n_target=1)
        cached = replace(config, token_cache=str(tmp_path / "cache"))
        messages = []
        for wanted in (config, cached, cached):
            with pytest.raises(DataError, match=r"\['endless'\]") as caught:
                wanted.build(TrainConfig())
            messages.append(str(caught.value))
        assert len(set(messages)) == 1
        assert entries(tmp_path / "cache") == []


class TestFound:
    def test_a_second_start_tokenises_nothing(self, tmp_path, model, monkeypatch):
        path = write_lines(tmp_path / "rows.jsonl", sums(60))
        pool = [TextSource(path=str(path))]
        config = LanguageConfig(model=str(model), pool=pool, token_cache=str(tmp_path / "cache"))
        first = config.build(TrainConfig())

        def refused(*_, **__):
            raise AssertionError("tokenised again")

        monkeypatch.setattr(TokenEncoder, "_tokenize", refused)
        same(first.pool, config.build(TrainConfig()).pool)
        with pytest.raises(AssertionError, match="tokenised again"):
            replace(config, max_tokens=100).build(TrainConfig())

    def test_nothing_is_in_memory(self, tmp_path, model):
        path = write_lines(tmp_path / "rows.jsonl", sums(60))
        task = LanguageConfig(
            model=str(model), pool=[TextSource(path=str(path))], token_cache=str(tmp_path / "cache")
        ).build(TrainConfig())
        for pool in (task.pool, task.target, task.test):
            tokens = tokens_of(pool)
            for array in (tokens.ids, tokens.loss_mask, tokens.offsets):
                assert isinstance(array.base, np.memmap)
                assert not array.flags.writeable
        files = sorted(p.name for p in (tmp_path / "cache").glob("*/*"))
        assert files == sorted(3 * [*(f"{name}.bin" for name in ARRAYS), MANIFEST])

    def test_a_folder_that_cannot_be_written_to_serves_all_the_same(self, tmp_path, fetch, monkeypatch):
        expected = fetch()

        def refused(*_, **__):
            raise PermissionError("read-only")

        monkeypatch.setattr(token_cache_module, "RunLock", refused)
        assert np.array_equal(fetch().ids, expected.ids)
        with pytest.raises(DataError, match=r"cannot be written to token_cache = .*read-only"):
            fetch(longest=99)


class TestKeys:
    @pytest.mark.parametrize(
        "options",
        [
            {"longest": 99},
            {"separator": " "},
            {"chat": False},
            {"drop": True},
            {"tok": tokenizer(MARKED)},
            {"tok": tokenizer(pad="</s>")},
        ],
    )
    def test_what_decides_on_the_tokens_gives_another_entry(self, tmp_path, fetch, options):
        fetch()
        fetch(**options)
        assert len(entries(tmp_path / "cache")) == 2

    def test_another_vocabulary(self, tmp_path, fetch):
        fetch()
        tok = tokenizer()
        tok.add_tokens(["what is"])
        result = fetch(tok)
        assert len(entries(tmp_path / "cache")) == 2
        assert len(tok) - 1 in result.ids

    def test_one_other_letter_in_the_rows(self, tmp_path, fetch, rows):
        fetch()
        answers = rows.table["response"].to_pylist()
        answers[17] = "7" + answers[17]
        fetch(given=replace(rows, table=rows.table.set_column(1, "response", pa.array(answers))))
        assert len(entries(tmp_path / "cache")) == 2

    def test_ids_names_sources_and_chunks_do_not_count(self, tmp_path, fetch, rows):
        first = fetch()
        chunked = pa.concat_tables([rows.table.slice(0, 11), rows.table.slice(11)])
        other = Rows(chunked, rows.format, pa.array([f"other-{i}" for i in range(30)]), "another", rows.ids)
        assert np.array_equal(fetch(given=other).ids, first.ids)
        large = pa.table({n: rows.table[n].cast(pa.large_string()) for n in rows.table.column_names})
        assert np.array_equal(fetch(given=replace(rows, table=large)).ids, first.ids)
        assert len(entries(tmp_path / "cache")) == 1

    def test_what_the_last_call_of_a_tokenizer_asked_for_does_not_count(self):
        tok = tokenizer()
        before = result_fields(TokenEncoder(tok, Renderer(tok), 100))
        tok(["a", "bcd"], truncation=True, max_length=2, padding=True)
        assert json.loads(tok.backend_tokenizer.to_str())["truncation"] is not None
        assert result_fields(TokenEncoder(tok, Renderer(tok), 100)) == before

    def test_a_template_that_writes_the_date_is_of_its_day(self, monkeypatch):
        tok = tokenizer("{{ strftime_now('%d') }}" + MARKED)
        days = []
        for day in (1, 2):
            monkeypatch.setattr(
                token_cache_module, "date", type("date", (), {"today": staticmethod(lambda day=day: day)})
            )
            days.append(result_fields(TokenEncoder(tok, Renderer(tok), 100)))
        assert days[0] != days[1]

    @settings(deadline=None, max_examples=30)
    @given(
        st.lists(
            st.one_of(
                st.none(), st.lists(st.fixed_dictionaries({"role": st.text(max_size=2), "n": st.integers(0, 3)}))
            ),
            min_size=1,
            max_size=12,
        ),
        st.integers(0, 12),
        st.integers(1, 5),
    )
    def test_nested_rows_are_hashed_whatever_their_chunks(self, messages, cut, shard):
        kind = pa.list_(pa.struct([("role", pa.string()), ("n", pa.int64())]))
        column = pa.array(messages, kind)

        def digest_of(column):
            ids = pa.array([str(i) for i in range(len(column))])
            return rows_digest(Rows(pa.table({"messages": column}), "messages", ids, "x"))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows_module, "ROWS_AT_ONCE", shard)
            expected = digest_of(column)
            assert digest_of(pa.chunked_array([column[:cut], column[cut:]])) == expected
            padded = pa.array([[{"role": "x", "n": 1}], *messages], kind)
            assert digest_of(padded[1:]) == expected
            # Where rows end, and which of them are missing, counts.
            assert digest_of(pa.array([*messages, None], kind)) != digest_of(pa.array([*messages, []], kind))
            assert digest_of(padded) != expected

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (["ab", "c"], ["a", "bc"]),
            ([None, "a"], ["", "a"]),
            (["1"], [1]),
            ([1], [1.0]),
            ([["a"], ["b"]], [["a", "b"], []]),
        ],
    )
    def test_different_rows_have_different_hashes(self, one, other):
        result = [
            rows_digest(Rows(pa.table({"text": pa.array(x)}), "text", pa.array(["i"] * len(x)), "x"))
            for x in (one, other)
        ]
        assert result[0] != result[1]


class TestRuns:
    def test_where_tokens_are_kept_is_no_part_of_what_is_run(self, tmp_path, model):
        config = LanguageConfig(model=str(model), pool=[TextSource(path="rows.jsonl")])
        described = [
            Setting("t", "m", 0, "language", c, TrainConfig()).describe()
            for c in (config, replace(config, token_cache="elsewhere"), replace(config, max_tokens=9))
        ]
        assert described[0] == described[1] != described[2]

    def test_a_selection_may_be_gone_on_with_from_the_cache(self, tmp_path, model, capsys):
        path = write_lines(tmp_path / "rows.jsonl", sums(30))
        config = {"kind": "language", "task": {"model": str(model), "pool": [{"path": str(path)}]}, "method": "random"}
        (tmp_path / "c.yaml").write_text(json.dumps(config))
        run = ["select", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run"), "--tensorboard", "false"]
        cached = ["--task.token_cache", str(tmp_path / "cache")]
        assert main([*run, "--budget", "2 epochs"]) == 0
        capsys.readouterr()
        assert main([*run, "--budget", "2 epochs", *cached]) == 0
        assert "finished before" in capsys.readouterr().out
        assert main([*run, "--budget", "2 epochs", "--task.max_tokens", "99"]) == 1
