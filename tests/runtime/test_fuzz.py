"""Whatever a stranger's file holds, what comes out is a `CadsError`: of configurations, selections and checkpoints."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.cli.main import main
from cads.errors import CadsError, CheckpointError, DataError, SelectionError
from cads.runtime import checkpoint, safe_read
from cads.runtime.checkpoint import MANIFEST, TENSORS, VALUES, CheckpointConfig, State, read_checkpoint
from cads.runtime.journal import Journal, map_shards, replay_or_run
from cads.runtime.journal_store import FINISHED
from cads.runtime.run_folder import RunFolder
from cads.scoring.ranking import Ranking
from cads.selection import Selection
from cads.selection_files import COLUMNS
from tests.support.killed_runs import trained

FUZZED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damages(draw):
    """A function that changes bytes: flips bits, cuts, repeats, or puts others in between."""
    kinds = draw(st.lists(st.sampled_from(["flip", "cut", "repeat", "insert", "zero"]), min_size=1, max_size=3))
    places = [draw(st.floats(0, 1, exclude_max=True)) for _ in kinds]
    bit, extra = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=12))

    def damage(content: bytes) -> bytes:
        for kind, place in zip(kinds, places, strict=True):
            i = int(place * len(content))
            if kind == "flip" and content:
                content = content[:i] + bytes([content[i] ^ (1 << bit)]) + content[i + 1 :]
            elif kind == "cut":
                content = content[:i]
            elif kind == "repeat":
                content = content[:i] + content[i:] * 2
            elif kind == "zero":
                content = content[:i] + bytes(len(content[i:]))
            else:
                content = content[:i] + extra + content[i:]
        return content

    return damage


@st.composite
def substitutions(draw):
    """A function that puts any JSON value at one place of a JSON document, or removes what is there."""
    path, value = draw(st.lists(st.integers(0, 20), min_size=1, max_size=5)), draw(JSON)
    remove = draw(st.booleans())

    def substitute(document):
        here = document
        for depth, number in enumerate(path):
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            if not keys:
                return document
            key = keys[number % len(keys)]
            if depth == len(path) - 1 or not isinstance(here[key], dict | list):
                if remove:
                    del here[key]
                else:
                    here[key] = value
                return document
            here = here[key]
        return document

    return substitute


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    """A small Selection on disk."""
    n, ledger = 20, Ledger()
    ledger.charge(SELECT, "short runs", 123.0, usages=3)
    original = Selection(
        ids=pa.array([f"e{i}" for i in range(n)]),
        score=np.linspace(0, 1, n),
        probability=np.linspace(0, 1, n),
        selected=np.arange(n) % 2 == 0,
        method="random",
        seed=0,
        budget=Budget(5, "epochs"),
        ledger=ledger,
        pool_hash="abc",
        sources=["a", "b"] * 10,
        notes={"guard": "none", "list": [1, {"x": None}]},
    )
    return original.save(tmp_path_factory.mktemp("fuzz") / "selection")


@pytest.fixture(scope="module")
def ranking(tmp_path_factory):
    ids, ledger = pa.array([f"e{i}" for i in range(9)]), Ledger()
    original = Ranking(ids, np.arange(9.0), "ppl", 0, ledger, "abc")
    return original.save(tmp_path_factory.mktemp("fuzz") / "ranking")


@pytest.fixture
def damaged():
    """A copy of a folder with one file changed, for each example anew."""
    folders = []

    def copy(folder, file, content):
        folders.append(Path(tempfile.mkdtemp()) / "copy")
        shutil.copytree(folder, folders[-1])
        (folders[-1] / file).write_bytes(content)
        return folders[-1]

    yield copy
    for folder in folders:
        shutil.rmtree(folder.parent)


@FUZZED
@given(damage=damages(), file=st.sampled_from(["selection.json", "scores.parquet"]))
def test_a_damaged_selection(selection, damaged, damage, file):
    folder = damaged(selection, file, damage((selection / file).read_bytes()))
    with suppress(SelectionError):
        Selection.load(folder).source_counts()


@FUZZED
@given(substitute=substitutions())
def test_a_selection_of_other_types(selection, damaged, substitute):
    header = substitute(json.loads((selection / "selection.json").read_text()))
    folder = damaged(selection, "selection.json", json.dumps(header).encode())
    with suppress(SelectionError):
        Selection.load(folder).table()


@FUZZED
@given(damage=damages(), file=st.sampled_from(["ranking.json", "scores.parquet"]))
def test_a_damaged_ranking(ranking, damaged, damage, file):
    folder = damaged(ranking, file, damage((ranking / file).read_bytes()))
    with suppress(SelectionError):
        Ranking.load(folder)


@FUZZED
@given(substitute=substitutions())
def test_a_ranking_of_other_types(ranking, damaged, substitute):
    header = substitute(json.loads((ranking / "ranking.json").read_text()))
    with suppress(SelectionError):
        Ranking.load(damaged(ranking, "ranking.json", json.dumps(header).encode()))


class TestBombs:
    """Files of a few kilobytes that would be gigabytes."""

    def write(self, path, rows, text, **options):
        columns = {"id": [text] * rows, "source": [text] * rows, "rank": np.zeros(rows, int), "selected": [True] * rows}
        columns |= {"score": np.zeros(rows), "probability": np.zeros(rows)}
        pq.write_table(pa.table(columns).select(list(COLUMNS)), path, **options)

    def test_rows_are_counted_first(self, tmp_path, monkeypatch):
        self.write(tmp_path / "x", 100_000, "x")
        assert (tmp_path / "x").stat().st_size < 10_000
        monkeypatch.setattr(safe_read, "memory_limit", lambda: 1e6)
        monkeypatch.setattr(pq.ParquetFile, "read", lambda *_: pytest.fail("it was read"))
        with pytest.raises(DataError, match=r"100000 rows, which take .* more than memory holds"):
            safe_read.read_scores(tmp_path / "x", COLUMNS)

    def test_text_is_measured_before_it_is_spelt_out(self, tmp_path, monkeypatch):
        self.write(tmp_path / "x", 10_000, "x" * 1000)
        monkeypatch.setattr(safe_read, "memory_limit", lambda: 1e6)
        with pytest.raises(DataError, match=r"column 'id' of .* holds 10000000 bytes of text"):
            safe_read.read_scores(tmp_path / "x", COLUMNS)

    def test_compressions_without_a_bound_are_refused(self, tmp_path):
        self.write(tmp_path / "x", 10, "x", compression="gzip")
        with pytest.raises(DataError, match=r"compressed by GZIP: write it with one of \['UNCOMPRESSED', 'SNAPPY'\]"):
            safe_read.read_scores(tmp_path / "x", COLUMNS)

    def test_what_is_written_is_read(self, tmp_path):
        self.write(tmp_path / "x", 10, "x")
        assert safe_read.read_scores(tmp_path / "x", COLUMNS).equals(pq.ParquetFile(tmp_path / "x").read())

    def test_links_are_not_followed(self, selection, damaged):
        for file in ("selection.json", "scores.parquet"):
            folder = damaged(selection, file, b"")
            (folder / file).unlink()
            (folder / file).symlink_to(selection / file)
            with pytest.raises(SelectionError, match="symbolic link"):
                Selection.load(folder)


class Work:
    """A training run and a pass over a pool, in a journal whose checkpoints can be changed in between."""

    def __init__(self, task, folder):
        self.task, self.folder = task, folder
        self.go()

    def go(self, folder=None):
        with Journal(folder or self.folder, {"seed": 0}, CheckpointConfig(every_seconds=None, every_steps=3)).open():
            fit, ledger = trained(self.task, steps=4)
            map_shards("scores", [], ledger, 3, lambda i: np.full(2, float(i)))
            replay_or_run("measuring", [], ledger, lambda _: State({"objective": 1.0})).number("objective")
        return fit.losses

    def newest(self):
        return sorted(p for p in self.folder.iterdir() if FINISHED in p.name)[0]


@pytest.fixture(scope="module")
def work(features, tmp_path_factory):
    return Work(features(batch_size=8), tmp_path_factory.mktemp("work"))


@FUZZED
@given(damage=damages(), file=st.sampled_from([TENSORS, VALUES, MANIFEST]))
def test_a_damaged_checkpoint_changes_no_result(work, damaged, damage, file):
    """It is passed over, and what it held is done again."""
    folder = damaged(work.folder, f"{work.newest().name}/{file}", damage((work.newest() / file).read_bytes()))
    np.testing.assert_array_equal(work.go(folder), work.go())


@FUZZED
@given(substitute=substitutions(), file=st.sampled_from([VALUES, MANIFEST]))
def test_a_checkpoint_of_other_types_with_right_hashes(work, damaged, substitute, file):
    document = substitute(json.loads((work.newest() / file).read_text()))
    folder = damaged(work.folder, f"{work.newest().name}/{file}", json.dumps(document).encode())
    forged = folder / work.newest().name
    manifest = json.loads((forged / MANIFEST).read_text())
    if isinstance(manifest.get("files"), dict):
        for name in manifest["files"]:
            with suppress(OSError, ValueError):
                manifest["files"][name] = checkpoint._describe(forged / name)
    manifest.pop("sha256", None)
    manifest["sha256"] = checkpoint._signature(manifest)
    (forged / MANIFEST).write_text(json.dumps(manifest))
    with suppress(CheckpointError):
        work.go(folder)


@FUZZED
@given(content=st.binary(max_size=200), file=st.sampled_from([TENSORS, VALUES, MANIFEST]))
def test_anything_at_all_as_a_checkpoint(work, damaged, content, file):
    folder = damaged(work.folder, f"{work.newest().name}/{file}", content)
    with pytest.raises(CheckpointError):
        read_checkpoint(folder / work.newest().name)


@FUZZED
@given(document=JSON | st.fixed_dictionaries({"schema_version": JSON, "finished": JSON, "identity": JSON}))
def test_any_record_of_a_run(document):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "select.json").write_text(json.dumps(document))
        (Path(folder) / "selection").mkdir()
        with suppress(CadsError), RunFolder(folder, "select", {"seed": 0}, ("selection",)) as run:
            run.open_or_skip(pool="abc")


CONFIG = {
    "task": {"hidden": 16, "n_pool": 40, "n_target": 20, "n_test": 20, "sources": [{"name": "a"}, {"name": "b"}]},
    "train": {"batch_size": 8, "learning_rate": 1e-3, "schedule": "cosine", "clip_norm": None},
    "checkpoint": {"every_seconds": 60.0, "every_steps": None},
    "options": {"fraction": 0.5},
    "method": "random",
    "budget": "2 epochs",
    "seed": 0,
    "tensorboard": False,
    "progress": False,
}


def refused_or_run(text: bytes, capsys) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_bytes(text)
        try:
            status = main(["select", str(file), "--out", f"{folder}/run", "--print_config"])
        except SystemExit as left:
            status = left.code
        assert status in (0, 1, 2, None)
        assert "Traceback" not in capsys.readouterr().err


@settings(FUZZED, max_examples=30)
@given(substitute=substitutions())
def test_a_configuration_of_other_types(capsys, substitute):
    refused_or_run(yaml.safe_dump(substitute(json.loads(json.dumps(CONFIG)))).encode(), capsys)


@settings(FUZZED, max_examples=30)
@given(damage=damages())
def test_a_damaged_configuration(capsys, damage):
    refused_or_run(damage(yaml.safe_dump(CONFIG).encode()), capsys)


def test_a_configuration_runs_nothing(capsys, tmp_path):
    refused_or_run(f"!!python/object/apply:os.system ['touch {tmp_path}/ran']".encode(), capsys)
    refused_or_run(f"task: !!python/object/apply:os.system ['touch {tmp_path}/ran']".encode(), capsys)
    assert not list(tmp_path.iterdir())


def test_pickles_are_not_read(work, damaged, tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "pickle")
    folder = damaged(work.folder, f"{work.newest().name}/{TENSORS}", (tmp_path / "pickle").read_bytes())
    with pytest.raises(CheckpointError):
        read_checkpoint(folder / work.newest().name)
