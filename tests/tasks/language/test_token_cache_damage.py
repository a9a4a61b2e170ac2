"""Tokens on disk that are damaged, cut off or waited for: sound, or made anew."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal

import numpy as np
import pytest

from cads.errors import CadsError, ConfigError, DataError
from cads.runtime.processes import digest
from cads.tasks.language import token_cache
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.encoding import TokenEncoder
from cads.tasks.language.formats import Renderer
from cads.tasks.language.rows import TextSource, load_rows
from cads.tasks.language.token_cache import ABANDONED, ARRAYS, ENTRY_VERSION, MANIFEST, TokenCache
from tests.support.tiny_llama import tokenizer
from tests.support.token_caches import entries, warnings_of

pytestmark = pytest.mark.usefixtures("small_shards")

FORK = multiprocessing.get_context("fork")


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
    "a later version": edited(lambda m: m.update(schema_version=ENTRY_VERSION + 1)),
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
        before = [np.array(x) for x in (expected.ids, expected.loss_mask, expected.offsets)]
        cache = tmp_path / "cache"
        (entry,) = entries(cache)
        DAMAGES[name](cache / entry)
        actual = fetch()
        (said,) = warnings_of(caplog)
        assert "made anew" in said
        assert entry in said
        assert entries(cache) == [entry]
        assert not (cache / entry).is_symlink()
        for tokens in (actual, fetch()):
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
        write = token_cache.TokenFiles._append

        def full(files, name, values):
            if name == "ids" and files._ends["offsets"] > 100:
                raise OSError(28, "No space left on device")
            write(files, name, values)

        monkeypatch.setattr(token_cache.TokenFiles, "_append", full)
        with pytest.raises(DataError, match=r"token_cache = .*No space left on device\): make room"):
            fetch()
        assert entries(tmp_path / "cache") == []


def killed_while_writing(call):
    """A process that is killed when it tokenises its third shard."""
    tokenize_all, shards = TokenEncoder._tokenize, []

    def tokenize(*args, **options):
        shards.append(1)
        if len(shards) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return tokenize_all(*args, **options)

    TokenEncoder._tokenize = tokenize
    call()


def counted(call, log, started):
    """A process that writes down each shard that it tokenises, and at the end what it got."""
    tokenize_all = TokenEncoder._tokenize

    def tokenize(*args, **options):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return tokenize_all(*args, **options)

    TokenEncoder._tokenize = tokenize
    started.wait()
    result = call()
    with open(log, "a") as file:
        file.write(f"got {int(result.ids.sum())}\n")


class TestProcesses:
    def test_one_that_is_killed_leaves_nothing_that_is_used(self, tmp_path, fetch):
        killed = FORK.Process(target=killed_while_writing, args=(fetch,))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        cache = tmp_path / "cache"
        (remnant,) = cache.glob(".*")
        assert not [p for p in cache.iterdir() if re.fullmatch(r"[0-9a-f]{32}", p.name)]
        tok = tokenizer()
        expected, _ = TokenEncoder(tok, Renderer(tok), 100).encode(
            load_rows(TextSource(path=str(tmp_path / "rows.jsonl")), 0)
        )
        assert np.array_equal(fetch().ids, expected.ids)
        # It is removed when it is old; what is not an entry of ours never.
        hidden_folder = cache / ".config.d"
        hidden_folder.mkdir()
        (hidden_folder / "mine").write_text("mine")
        swept = TokenCache(cache, TokenEncoder(tok, Renderer(tok), 100))
        swept.sweep()
        assert remnant.exists()
        for path in (remnant, *remnant.iterdir(), hidden_folder, hidden_folder / "mine"):
            os.utime(path, (0, 0))
        swept.sweep()
        assert not remnant.exists()
        assert (hidden_folder / "mine").exists()
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


def test_an_error_that_is_no_fault_of_the_cache_passes(tmp_path, fetch, monkeypatch):
    class OtherError(CadsError):
        pass

    def refused(*_, **__):
        raise OtherError("no")

    monkeypatch.setattr(TokenEncoder, "_tokenize", refused)
    with pytest.raises(OtherError):
        fetch()
    assert entries(tmp_path / "cache") == []
