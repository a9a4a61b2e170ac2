"""Tokens that stay on disk: the same pools as in memory, made once, sound or made anew, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import signal
import tracemalloc
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import MARKED, conversations, model_folder, sums, tokenizer, write_lines

from cads.cli import main
from cads.errors import CadsError, ConfigError, DataError
from cads.processes import digest
from cads.study.grid import Setting
from cads.tasks import language_cache, language_data, language_tokens
from cads.tasks.language import LanguageConfig, tokens_of
from cads.tasks.language_cache import ABANDONED, ARRAYS, MANIFEST, TokenCache, decisive, rows_digest
from cads.tasks.language_data import Rows, TextSource, load_rows
from cads.tasks.language_encoding import Encoder
from cads.tasks.language_formats import Renderer
from cads.tasks.language_tokens import Tokens
from cads.trainer import TrainConfig

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(language_data, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(language_tokens, "SEQUENCES_AT_ONCE", 3)
    monkeypatch.setattr(language_tokens, "TOKENS_AT_ONCE", 64)


def texts(n=40):
    """Of which the first has no answer token: its only token cannot be predicted."""
    return [{"text": "" if i == 0 else f"{i} " + "abc " * (i % 9)} for i in range(n)]


def in_memory_and_on_disk(tmp_path, model, pool, **options):
    """How the task is built in memory, with a cache that is empty, and with one that is not."""
    config = LanguageConfig(model=str(model), pool=pool, **options)
    cached = replace(config, token_cache=str(tmp_path / "cache"))
    return [partial(c.build, TrainConfig(batch_size=8)) for c in (config, cached, cached)]


def warnings_of(caplog):
    """What was said since it was last asked for."""
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return said


def same(one, other):
    a, b = tokens_of(one), tokens_of(other)
    assert one.content_hash == other.content_hash
    assert one.ids == other.ids
    assert one.source_names == other.source_names
    for x, y in ((one.sources, other.sources), (a.subtasks, b.subtasks)):
        assert (x is None) == (y is None)
        assert x is None or np.array_equal(x, y)
    for name in ("ids", "learned", "offsets", "answers"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        assert np.array_equal(x, y)
    assert (a.texts, a.pad, a.longest, a.packed) == (b.texts, b.pad, b.longest, b.packed)
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
        assert bool(said[0]) == (options.get("drop", False))
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
        (memory, made, found), said = zip(*((build(), warnings_of(caplog)) for build in ways), strict=True)
        for task in (made, found):
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
        encoder = Encoder(tok, Renderer(tok), 100)
        expected, _ = encoder.encode(loaded)
        for _ in range(2):
            (found, _), cache = TokenCache(tmp_path / "cache", encoder).fetch([loaded]), tmp_path / "cache"
            assert np.array_equal(found.ids, expected.ids)
            assert np.array_equal(found.learned, expected.learned)
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

        monkeypatch.setattr(Encoder, "_tokenize", refused)
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
            for array in (tokens.ids, tokens.learned, tokens.offsets):
                assert isinstance(array.base, np.memmap)
                assert not array.flags.writeable
        files = sorted(p.name for p in (tmp_path / "cache").glob("*/*"))
        assert files == sorted(3 * [*(f"{name}.bin" for name in ARRAYS), MANIFEST])

    def test_a_folder_that_cannot_be_written_to_serves_all_the_same(self, tmp_path, fetch, monkeypatch):
        expected = fetch()

        def refused(*_, **__):
            raise PermissionError("read-only")

        monkeypatch.setattr(language_cache, "RunLock", refused)
        assert np.array_equal(fetch().ids, expected.ids)
        with pytest.raises(DataError, match=r"cannot be written to token_cache = .*read-only"):
            fetch(longest=99)


@pytest.fixture
def rows(tmp_path):
    return load_rows(TextSource(path=str(write_lines(tmp_path / "rows.jsonl", sums(30)))), 0)


@pytest.fixture
def fetch(tmp_path, rows):
    """Fetches 30 sums: `fetch(tokenizer, rows, longest=..., separator=..., chat=..., drop=...)`."""

    def call(tok=None, given=None, *, longest=100, separator="\n", chat=None, drop=False):
        tok = tok or tokenizer()
        encoder = Encoder(tok, Renderer(tok, separator, chat), longest, drop=drop)
        return TokenCache(tmp_path / "cache", encoder).fetch([given or rows])[0]

    return call


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


WORDS = st.text(max_size=2)


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
        found = fetch(tok)
        assert len(entries(tmp_path / "cache")) == 2
        assert len(tok) - 1 in found.ids

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
        before = decisive(Encoder(tok, Renderer(tok), 100))
        tok(["a", "bcd"], truncation=True, max_length=2, padding=True)
        assert json.loads(tok.backend_tokenizer.to_str())["truncation"] is not None
        assert decisive(Encoder(tok, Renderer(tok), 100)) == before

    def test_a_template_that_writes_the_date_is_of_its_day(self, monkeypatch):
        tok = tokenizer("{{ strftime_now('%d') }}" + MARKED)
        days = []
        for day in (1, 2):
            monkeypatch.setattr(language_cache, "date", type("date", (), {"today": staticmethod(lambda day=day: day)}))
            days.append(decisive(Encoder(tok, Renderer(tok), 100)))
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
            patch.setattr(language_data, "ROWS_AT_ONCE", shard)
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
        found = [
            rows_digest(Rows(pa.table({"text": pa.array(x)}), "text", pa.array(["i"] * len(x)), "x"))
            for x in (one, other)
        ]
        assert found[0] != found[1]


def edited(change):
    """A damage: the manifest changed, and signed as if it were whole."""

    def damage(entry):
        manifest = json.loads((entry / MANIFEST).read_text())
        manifest.pop("check")
        change(manifest)
        (entry / MANIFEST).write_text(json.dumps({**manifest, "check": digest(manifest)}))

    return damage


def rewritten(name, change):
    """A damage: an array changed, and described as if it were meant."""

    def damage(entry):
        values = np.fromfile(entry / f"{name}.bin", ARRAYS[name])
        data = np.ascontiguousarray(change(values), ARRAYS[name]).tobytes()
        (entry / f"{name}.bin").write_bytes(data)
        said = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        edited(lambda manifest: manifest["files"].update({name: said}))(entry)

    return damage


def flipped(name):
    def damage(entry):
        path = entry / f"{name}.bin"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return damage


def linked(entry):
    elsewhere = entry.parent.parent / "elsewhere"
    (entry / "ids.bin").rename(elsewhere)
    (entry / "ids.bin").symlink_to(elsewhere)


def linked_whole(entry):
    elsewhere = entry.parent.parent / "elsewhere"
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)


def outside(entry):
    """A manifest that names a file elsewhere, which is as it says."""
    (entry.parent.parent / "secret.bin").write_bytes((entry / "ids.bin").read_bytes())
    edited(lambda m: m["files"].update({"../../secret": m["files"].pop("ids")}))(entry)


DAMAGES = {
    **{f"{name} flipped": flipped(name) for name in ARRAYS if name != "left_out"},
    "truncated": lambda entry: os.truncate(entry / "ids.bin", 40),
    "extended": lambda entry: (entry / "learned.bin").open("ab").write(b"\0"),
    "emptied": lambda entry: os.truncate(entry / "text.bin", 0),
    "a file gone": lambda entry: (entry / "offsets.bin").unlink(),
    "no manifest": lambda entry: (entry / MANIFEST).unlink(),
    "manifest cut": lambda entry: os.truncate(entry / MANIFEST, 100),
    "manifest a list": lambda entry: (entry / MANIFEST).write_text("[1]"),
    "manifest deep": lambda entry: (entry / MANIFEST).write_text("[" * 100_000),
    "a count changed": lambda entry: (entry / MANIFEST).write_text(
        (entry / MANIFEST).read_text().replace('"cut": 0', '"cut": 5')
    ),
    "outside": outside,
    "a link": linked,
    "all a link": linked_whole,
    "another key": edited(lambda m: m.update(key="0" * 32)),
    "a later version": edited(lambda m: m.update(schema_version=2)),
    "more files": edited(lambda m: m["files"].update(more=m["files"]["ids"])),
    "sizes no numbers": edited(lambda m: m["files"]["ids"].update(bytes="many")),
    "other rows": edited(lambda m: m["parts"][0].update(rows=31)),
    "no parts": edited(lambda m: m.update(parts=[])),
    "left out beyond": edited(lambda m: m["parts"][0].update(left_out=1)),
    "parts no numbers": edited(lambda m: m["parts"][0].update(left_out="one")),
    "offsets beyond": rewritten("offsets", lambda x: x + 10**12),
    "offsets falling": rewritten("offsets", lambda x: np.append(x[:1], x[:0:-1])),
    "text offsets beyond": rewritten("text_offsets", lambda x: np.append(x[:-1], 10**12)),
    "text no text": rewritten("text", lambda x: x | 0x80),
    "half an id": rewritten("ids", lambda x: x[:-3]),
}


class TestDamage:
    @pytest.mark.parametrize("name", DAMAGES)
    def test_what_is_damaged_is_made_anew(self, tmp_path, fetch, caplog, name):
        expected = fetch()
        before = [np.array(x) for x in (expected.ids, expected.learned, expected.offsets)]
        cache = tmp_path / "cache"
        (entry,) = entries(cache)
        DAMAGES[name](cache / entry)
        found = fetch()
        (said,) = warnings_of(caplog)
        assert "made anew" in said
        assert entry in said
        assert entries(cache) == [entry]
        assert not (cache / entry).is_symlink()
        for tokens in (found, fetch()):
            assert all(np.array_equal(x, y) for x, y in zip(before, tokens[:3], strict=True))
        assert warnings_of(caplog) == []

    def test_what_a_task_reads_stays_when_the_entry_is_made_anew(self, tmp_path, fetch):
        first = fetch()
        before = first.ids.copy()
        (entry,) = (tmp_path / "cache").iterdir()
        # Not in place: a file that is cut short under a map ends the process.
        data = (entry / "ids.bin").read_bytes()
        (entry / "ids.bin").unlink()
        (entry / "ids.bin").write_bytes(data[:-4])
        fetch()
        assert np.array_equal(first.ids, before)

    def test_what_is_no_folder_is_refused(self, tmp_path, fetch):
        (tmp_path / "cache").write_text("mine")
        with pytest.raises(ConfigError, match=r"token_cache = .* is no folder"):
            fetch()
        with pytest.raises(ConfigError, match="token_cache is empty"):
            LanguageConfig(model="m", pool=[TextSource(path="p")], token_cache="")

    def test_a_full_disk_is_named_and_nothing_stays(self, tmp_path, fetch, monkeypatch):
        write = language_cache.TokenFiles._append

        def full(files, name, values):
            if name == "ids" and files._ends["offsets"] > 100:
                raise OSError(28, "No space left on device")
            write(files, name, values)

        monkeypatch.setattr(language_cache.TokenFiles, "_append", full)
        with pytest.raises(DataError, match=r"token_cache = .*No space left on device\): make room"):
            fetch()
        assert entries(tmp_path / "cache") == []


def killed_while_writing(call):
    """A process that is killed when it tokenises its third shard."""
    whole, shards = Encoder._tokenize, []

    def tokenize(*args, **options):
        shards.append(1)
        if len(shards) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **options)

    Encoder._tokenize = tokenize
    call()


def counted(call, log, started):
    """A process that writes down each shard that it tokenises, and at the end what it got."""
    whole = Encoder._tokenize

    def tokenize(*args, **options):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return whole(*args, **options)

    Encoder._tokenize = tokenize
    started.wait()
    found = call()
    with open(log, "a") as file:
        file.write(f"got {int(found.ids.sum())}\n")


class TestProcesses:
    def test_one_that_is_killed_leaves_nothing_that_is_used(self, tmp_path, fetch):
        killed = FORK.Process(target=killed_while_writing, args=(fetch,))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        cache = tmp_path / "cache"
        (left,) = cache.glob(".*")
        assert not [p for p in cache.iterdir() if re.fullmatch(r"[0-9a-f]{32}", p.name)]
        tok = tokenizer()
        expected, _ = Encoder(tok, Renderer(tok), 100).encode(
            load_rows(TextSource(path=str(tmp_path / "rows.jsonl")), 0)
        )
        assert np.array_equal(fetch().ids, expected.ids)
        # It is removed when it is old; what is not an entry of ours never.
        own = cache / ".config.d"
        own.mkdir()
        (own / "mine").write_text("mine")
        swept = TokenCache(cache, Encoder(tok, Renderer(tok), 100))
        swept.sweep()
        assert left.exists()
        for path in (left, *left.iterdir(), own, own / "mine"):
            os.utime(path, (0, 0))
        swept.sweep()
        assert not left.exists()
        assert (own / "mine").exists()
        assert ABANDONED >= 600

    def test_one_writes_and_the_others_wait(self, tmp_path, fetch):
        log, started = tmp_path / "log", FORK.Event()
        others = [FORK.Process(target=counted, args=(fetch, log, started)) for _ in range(3)]
        for process in others:
            process.start()
        started.set()
        for process in others:
            process.join(60)
        lines = log.read_text().splitlines()
        got = [line for line in lines if line.startswith("got")]
        assert len(got) == 3
        assert len(set(got)) == 1
        assert len({line for line in lines if line not in got}) == 1
        assert len(lines) == 3 + -(-30 // 7)
        assert len(entries(tmp_path / "cache")) == 1


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


def random_tokens(sizes, seed=0):
    rng, offsets = np.random.default_rng(seed), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ids = rng.integers(0, 9, offsets[-1]).astype(np.int32)
    names = pa.array([f"example {i}" for i in range(len(sizes))], pa.large_string())
    return Tokens(ids, rng.random(offsets[-1]) < 0.6, offsets, names, longest=64)


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=40)


class TestPieces:
    @settings(deadline=None, max_examples=40)
    @given(SIZES, st.integers(0, 99), st.integers(1, 9), st.sampled_from([8, 16, 64]))
    def test_they_change_nothing(self, sizes, seed, sequences, tokens):
        found = random_tokens(sizes, seed)
        learned = [found.learned[a:b] for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]
        last = {int(i) for i, m, n in zip(found.ids, found.learned, [*found.learned[1:], False], strict=True) if m > n}
        order = np.random.default_rng(seed).integers(0, len(sizes), 7)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(language_tokens, "SEQUENCES_AT_ONCE", sequences)
            patch.setattr(language_tokens, "TOKENS_AT_ONCE", tokens)
            assert found.answers.tolist() == [int(m[1:].sum()) for m in learned]
            assert found.last_answers == last
            whole = hashlib.blake2b(np.packbits(found.learned).tobytes(), digest_size=16)
            assert found.label_digest() == whole.digest()
            taken = found.take(order)
            parts = [found.take(np.array([i])) for i in order]
        assert taken.ids.tolist() == [i for part in parts for i in part.ids.tolist()]
        assert taken.learned.tolist() == [m for i in order for m in learned[i].tolist()]
        assert taken.texts.to_pylist() == [f"example {i}" for i in order]
        pairs = np.stack([found._widths(found.lengths()), found._widths(found.answers)], axis=1)
        _, first, codes = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        representatives, same_cost = found.shapes()
        assert representatives.tolist() == first.tolist()
        assert same_cost.tolist() == codes.reshape(-1).tolist()

    @settings(deadline=None, max_examples=40)
    @given(st.sets(st.integers(0, 29), min_size=1), st.sets(st.integers(0, 30)), st.integers(1, 9))
    def test_drawn_rows_are_those_that_were_drawn(self, drawn, cuts, size):
        table = pa.table({"text": [f"row {i}" for i in range(30)]})
        edges = [0, *sorted(cuts), 30]
        chunks = pa.concat_tables([table.slice(a, b - a) for a, b in pairwise(edges)])
        rows = Rows(chunks, "text", pa.array([f"id-{i}" for i in range(30)]), "x")
        positions = np.array(sorted(drawn))
        once = rows.take(positions)
        twice = once.take(np.arange(len(positions))[::2])
        for found, expected in ((rows, np.arange(30)), (once, positions), (twice, positions[::2])):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(language_data, "ROWS_AT_ONCE", size)
                shards = list(found.shards())
            assert [len(t) for _, t in shards[:-1]] == [size] * (len(shards) - 1)
            assert [x for ids, _ in shards for x in ids.to_pylist()] == [f"id-{i}" for i in expected]
            assert [x for _, t in shards for x in t["text"].to_pylist()] == [f"row {i}" for i in expected]


class TestMemory:
    def test_encoding_takes_no_more_than_a_shard(self, tmp_path, monkeypatch):
        monkeypatch.setattr(language_data, "ROWS_AT_ONCE", 1)
        monkeypatch.setattr(language_cache, "HASHED_AT_ONCE", 2**12)
        n, letters = 300, 300
        texts = pa.array([f"{i:04d}" + "abc " * (letters // 4) for i in range(n)])
        rows = Rows(pa.table({"text": texts}), "text", pa.array([str(i) for i in range(n)]), "x")
        tok = tokenizer()
        encoder = Encoder(tok, Renderer(tok), 1000)
        cache = TokenCache(tmp_path / "cache", encoder)
        peaks = {}
        for name, encode in (
            ("memory", lambda: encoder.encode(rows)),
            ("made", lambda: cache.fetch([rows])),
            ("found", lambda: cache.fetch([rows])),
        ):
            tracemalloc.start()
            found = encode()[0]
            peaks[name] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            total = len(found.ids)
        held = total * 5
        assert total > n * letters
        assert peaks["memory"] > 2 * held
        # The shard under way, as Python objects, and a few numbers an example.
        assert peaks["made"] < held
        assert peaks["found"] < held / 2

    def test_mapped_arrays_are_not_copied(self, tmp_path, monkeypatch):
        monkeypatch.setattr(language_tokens, "SEQUENCES_AT_ONCE", 2**11)
        monkeypatch.setattr(language_tokens, "TOKENS_AT_ONCE", 2**20)
        n, size = 10_000, 800
        rng = np.random.default_rng(0)
        rng.integers(0, 9, n * size, dtype=np.int32).tofile(tmp_path / "ids")
        (rng.random(n * size) < 0.5).tofile(tmp_path / "learned")
        mapped = [np.asarray(np.memmap(tmp_path / n, k, "r")) for n, k in (("ids", np.int32), ("learned", bool))]
        texts = pa.array(["x"] * n, pa.large_string())
        tracemalloc.start()
        tokens = Tokens(*mapped, np.arange(0, n * size + 1, size), texts)
        assert int(tokens.answers.sum()) == pytest.approx(n * (size - 1) / 2, rel=0.01)
        assert len(tokens.last_answers) == 9
        tokens.label_digest()
        tokens.digests()
        tokens.shapes()
        tokens.batch(np.arange(0, n, n // 8))
        tokens.take(np.arange(100))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 0.4 * 5 * n * size


def test_an_error_that_is_no_fault_of_the_cache_passes(tmp_path, fetch, monkeypatch):
    class OtherError(CadsError):
        pass

    def refused(*_, **__):
        raise OtherError("no")

    monkeypatch.setattr(Encoder, "_tokenize", refused)
    with pytest.raises(OtherError):
        fetch()
    assert entries(tmp_path / "cache") == []
