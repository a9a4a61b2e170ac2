"""Checkpoints: whole or not there, verified before use, kept in twos, and refused where they are of another run."""

from __future__ import annotations

import errno
import json
import logging
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from cads.accounting.ledger import SELECT, Ledger
from cads.errors import CheckpointError, ConfigError
from cads.runtime import checkpoint as checkpoint_module
from cads.runtime import safe_read
from cads.runtime.atomic_files import remove_folder, whole_file, whole_folder
from cads.runtime.checkpoint import KEPT, MANIFEST, TENSORS, VALUES, CheckpointConfig, Checkpoints, State, differences
from cads.runtime.journal import Journal, replay_or_run
from cads.runtime.journal_record import JournalRecord
from cads.runtime.journal_store import FINISHED, UNDERWAY, RecordStore

IDENTITY = {"settings": {"seed": 0, "train": {"batch_size": 8}}, "pool": "abc"}


def state(value):
    return State({"value": value}, {"x": torch.arange(5) * value, "half": torch.ones(2, 3, dtype=torch.bfloat16)})


@pytest.fixture
def stored(tmp_path):
    """Three checkpoints of one kind, with values 1, 2, 3."""
    stored = Checkpoints(tmp_path / "c", IDENTITY)
    for value in (1, 2, 3):
        assert stored.write("kind", state(value)) is not None
    return stored


def values(stored, kind="kind"):
    return [result["value"] for _, result, _ in stored.read(kind)]


def test_what_is_written_is_read(stored):
    for (_, result, tensors), value in zip(stored.read("kind"), (3, 2, 1), strict=True):
        assert result == {"value": value}
        for name, x in tensors.load().items():
            assert torch.equal(x, state(value).tensors[name])
            assert x.dtype == state(value).tensors[name].dtype
    assert list(stored.read("other")) == []


def test_pruning_keeps_the_newest_of_its_kind(stored):
    stored.write("other", state(4))
    stored.prune("kind")
    assert values(stored) == [3, 2]
    assert KEPT == 2
    assert values(stored, "other") == [4]
    stored.prune("kind", keep=0)
    assert values(stored) == []


def test_numbers_go_on(stored, tmp_path):
    stored.prune("kind", keep=1)
    assert Checkpoints(tmp_path / "c", IDENTITY).write("kind", state(4)).name == "000004-kind"


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "removed":
        path.unlink()
    elif how == "longer":
        path.write_bytes(content + b"\0")
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "emptied", "removed", "longer", "bit flipped"])
@pytest.mark.parametrize("file", [TENSORS, VALUES, MANIFEST])
def test_a_damaged_one_is_passed_over_and_the_one_before_used(stored, tmp_path, caplog, how, file):
    damage(tmp_path / "c" / "000003-kind" / file, how)
    with caplog.at_level(logging.WARNING):
        assert values(stored) == [2, 1]
    assert "000003-kind" in caplog.text
    assert "passed over" in caplog.text
    stored.write("kind", state(4))
    stored.prune("kind")
    assert values(stored) == [4, 2], "a damaged checkpoint is none of the two that are kept"
    assert not (tmp_path / "c" / "000003-kind").exists()


def rewritten(folder, change):
    """The manifest with `change` made to it, signed anew: what a stranger could write."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("sha256")
    change(manifest)
    manifest["sha256"] = checkpoint_module._signature(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


class TestStrangers:
    def test_another_version(self, stored, tmp_path, caplog):
        rewritten(tmp_path / "c" / "000003-kind", lambda m: m.update(schema_version=99))
        assert values(stored) == [2, 1]
        assert "schema version 99; this library reads 1" in caplog.text

    @pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "values.json/../../x"])
    def test_paths_do_not_leave_their_folder(self, stored, tmp_path, name):
        (tmp_path / "c" / "secret").write_text("{}")

        def change(manifest):
            manifest["files"][name] = manifest["files"].pop(VALUES)

        rewritten(tmp_path / "c" / "000003-kind", change)
        assert values(stored) == [2, 1]

    @pytest.mark.parametrize("file", [TENSORS, VALUES, MANIFEST])
    def test_links_are_refused(self, stored, tmp_path, file):
        path = tmp_path / "c" / "000003-kind" / file
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        assert values(stored) == [2, 1]

    def test_a_folder_that_is_a_link_is_refused(self, stored, tmp_path):
        (tmp_path / "c" / "000003-kind").rename(tmp_path / "elsewhere")
        (tmp_path / "c" / "000003-kind").symlink_to(tmp_path / "elsewhere")
        assert values(stored) == [2, 1]
        stored.prune("kind", keep=0)
        assert (tmp_path / "elsewhere" / VALUES).exists(), "what a link points to is not ours to remove"

    def signed(self, folder):
        rewritten(folder, lambda m: m.update(files={n: checkpoint_module._describe(folder / n) for n in m["files"]}))

    def test_a_header_beyond_all_bounds(self, stored, tmp_path, caplog):
        folder = tmp_path / "c" / "000003-kind"
        (folder / TENSORS).write_bytes(struct.pack("<Q", 2**40) + b"{}")
        self.signed(folder)
        assert values(stored) == [2, 1]
        assert "header of 1099511627776 bytes" in caplog.text

    def test_files_larger_than_memory_are_not_read(self, stored, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoint_module, "memory_limit", lambda: 10.0)
        assert values(stored) == []

    def test_values_that_are_too_large_are_not_read(self, stored, tmp_path, monkeypatch):
        folder = tmp_path / "c" / "000003-kind"
        with open(folder / VALUES, "r+b") as file:
            file.truncate(checkpoint_module.JSON_LIMIT + 1)
        self.signed(folder)
        assert values(stored) == [2, 1]

    @pytest.mark.parametrize("content", ["[1]", "3", "[" * 100_000, "{", "\xff", '{"value": ' + "9" * 5000 + "}"])
    def test_values_that_are_no_names_and_values(self, stored, tmp_path, content):
        folder = tmp_path / "c" / "000003-kind"
        (folder / VALUES).write_text(content, encoding="latin-1")
        self.signed(folder)
        assert values(stored) == [2, 1]

    def test_no_journal(self, tmp_path):
        for content in ({}, {"operations": 3}, {"operations": [{"index": "x"}]}):
            folder = tmp_path / str(len(str(content)))
            Checkpoints(folder, IDENTITY).write(FINISHED, State(content, {"x": torch.ones(1)}))
            with pytest.raises(CheckpointError, match="does not hold a journal"):
                Journal(folder, IDENTITY)

    def test_the_state_of_another_model(self, features, tmp_path):
        from tests.support.killed_runs import EVERY_STEP, trained

        small, large = (features(hidden=h, batch_size=8) for h in (8, 9))
        with Journal(tmp_path, {}, EVERY_STEP).open():
            trained(small)
        large.costs = small.costs
        with Journal(tmp_path, {}, EVERY_STEP).open(), pytest.raises(CheckpointError, match="of another model"):
            trained(large)


class TestIdentity:
    def test_another_run_is_refused_by_what_differs(self, stored, tmp_path):
        other = {"settings": {"seed": 1, "train": {"batch_size": 8}}, "pool": "abd"}
        with pytest.raises(CheckpointError, match=r"pool was 'abc', now 'abd'; settings\.seed was 0, now 1;"):
            values(Checkpoints(tmp_path / "c", other))

    def test_differences(self):
        assert differences(IDENTITY, IDENTITY) == []
        assert differences({}, {"a": None}) == []
        changed = differences({"a": {"b": [1]}}, {"a": {"b": [2], "c": 1}})
        assert changed == ["a.b was [1], now [2]", "a.c was null, now 1"]
        assert len(differences({"a": "x" * 1000}, {"a": 1})[0]) < 100


class TestFullDisk:
    def full(self, monkeypatch, after=0):
        remaining = [after]
        plain = checkpoint_module.save_file

        def save(*given):
            if not remaining[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            remaining[0] -= 1
            plain(*given)

        monkeypatch.setattr(checkpoint_module, "save_file", save)
        return remaining

    def test_the_run_goes_on_and_what_was_there_stays_whole(self, stored, tmp_path, monkeypatch, caplog):
        remaining = self.full(monkeypatch)
        for _ in range(3):
            assert stored.write("kind", state(4)) is None
        assert caplog.text.count("no checkpoint could be written (ENOSPC No space left on device)") == 1
        assert values(stored) == [3, 2, 1]
        assert sorted(os.listdir(tmp_path / "c")) == ["000001-kind", "000002-kind", "000003-kind"]
        remaining[0] = 1
        assert stored.write("kind", state(4)) is not None
        assert values(stored) == [4, 3, 2, 1]

    @pytest.mark.parametrize("after", [0, 1, 3])
    def test_the_result_is_the_same(self, features, tmp_path, monkeypatch, after):
        from tests.support.killed_runs import EVERY_STEP, same_fit, trained

        task = features(batch_size=8)
        self.full(monkeypatch, after)
        with Journal(tmp_path / "j", {}, EVERY_STEP).open() as journal:
            same_fit(trained(task), trained(task))
            assert sum(1 for _ in journal.store.checkpoints.read(UNDERWAY)) == min(after, KEPT)


def test_a_name_stands_for_a_whole_folder(tmp_path):
    folder = tmp_path / "f"
    with whole_folder(folder) as partial:
        (partial / "a").write_text("1")
        assert not folder.exists()

    def fail():
        with whole_folder(folder) as partial:
            (partial / "a").write_text("2")
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        fail()
    assert (folder / "a").read_text() == "1"
    whole_file(tmp_path / "b", "3")
    whole_file(tmp_path / "b", "4")
    assert (tmp_path / "b").read_text() == "4"
    remove_folder(folder)
    remove_folder(folder)
    assert os.listdir(tmp_path) == ["b"]


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    stored = Checkpoints(tmp_path / "c", IDENTITY)
    stored.write("kind", state(1))
    (tmp_path / "c" / ".000002-kind.xyz").mkdir()
    (tmp_path / "c" / ".000002-kind.xyz" / TENSORS).write_bytes(b"half")
    Journal(tmp_path / "c", IDENTITY)
    assert os.listdir(tmp_path / "c") == ["000001-kind"]


def test_tied_weights_are_written(tmp_path):
    x = torch.ones(3)
    Checkpoints(tmp_path, {}).write("kind", State({}, {"a": x, "b": x, "c": x[:2]}))
    ((_, _, tensors),) = Checkpoints(tmp_path, {}).read("kind")
    assert {name: x.tolist() for name, x in tensors.load().items()} == {"a": [1] * 3, "b": [1] * 3, "c": [1] * 2}


@pytest.mark.parametrize(
    "given", [{"every_seconds": -1}, {"every_seconds": float("nan")}, {"every_steps": 0}, {"every_steps": -3}]
)
def test_intervals_that_are_refused(given):
    with pytest.raises(ConfigError, match=next(iter(given))):
        CheckpointConfig(**given)


def test_a_finished_operation_is_written_when_its_time_has_come(tmp_path):
    def written(config, times):
        journal = Journal(tmp_path / str(config), {}, config)
        with journal.open():
            for i in range(times):
                replay_or_run("doing", [], Ledger(), lambda _, i=i: State({"i": i}))
        return sum(1 for _ in journal.store.checkpoints.read(FINISHED))

    assert written(CheckpointConfig(every_seconds=1000), 5) == 0
    assert written(CheckpointConfig(every_seconds=0), 5) == 5
    assert written(CheckpointConfig(every_seconds=None, every_steps=2), 5) == 2


def record(value):
    return JournalRecord("doing", f"key {value}", {"value": value}, [], {"x": torch.full((3,), float(value))})


def held(store, index):
    result, finished = store.take(index)
    return None if result is None else (result.values["value"], result.state().tensors["x"].tolist(), finished)


def test_what_several_processes_had_under_way_outlives_those_that_go_on_with_less(tmp_path):
    """Three operations at once, then one after another: those still to come are where they were."""
    stored = RecordStore(tmp_path, IDENTITY, CheckpointConfig())
    assert stored.save({0: record(10), 1: record(11), 2: record(12)})
    for done in range(3):
        store = RecordStore(tmp_path, IDENTITY, CheckpointConfig())
        store.read()
        for before in range(done):
            assert held(store, before) == (20 + before, [20.0 + before] * 3, True)
        assert held(store, done) == (10 + done, [10.0 + done] * 3, False)
        store.keep(done, record(20 + done))
        assert store.flush()
    kinds = [path.name.partition("-")[2] for path in tmp_path.iterdir()]
    assert sorted(kinds) == [FINISHED] * 3, "nothing is under way any more"


def test_a_full_disk_keeps_what_was_under_way(tmp_path, monkeypatch):
    RecordStore(tmp_path, IDENTITY, CheckpointConfig()).save({0: record(10), 1: record(11)})
    store = RecordStore(tmp_path, IDENTITY, CheckpointConfig())
    store.read()
    store.take(0)
    store.keep(0, record(20))
    write = Checkpoints.write
    monkeypatch.setattr(Checkpoints, "write", lambda self, kind, s: None if kind == UNDERWAY else write(self, kind, s))
    assert store.flush()
    monkeypatch.undo()
    again = RecordStore(tmp_path, IDENTITY, CheckpointConfig())
    again.read()
    assert held(again, 0) == (20, [20.0] * 3, True)
    assert held(again, 1) == (11, [11.0] * 3, False)


def test_a_ledger_with_a_limit_is_restored(tmp_path):
    def charge(ledger):
        def compute(_):
            ledger.charge(SELECT, "s", 3.0)
            return State()

        replay_or_run("doing", [], ledger, compute)

    for _ in range(2):
        ledger = Ledger(limit=4.0)
        with Journal(tmp_path, {}, CheckpointConfig(every_seconds=0)).open():
            charge(ledger)
        assert ledger.left == 1.0


def test_the_limit_is_a_share_of_the_machine():
    assert 2**28 < safe_read.memory_limit() < 2**50


def test_a_safetensors_file_of_no_tensors(tmp_path):
    save_file({}, tmp_path / "x")
    Checkpoints(tmp_path / "c", {}).write("kind", State({"a": 1}, {}))
    ((_, result, tensors),) = Checkpoints(tmp_path / "c", {}).read("kind")
    assert (result, tensors.load()) == ({"a": 1}, {})
