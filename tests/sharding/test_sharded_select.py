"""A pool in shards: the result is that of one machine, nothing is lost or counted twice, what is foreign is named."""

from __future__ import annotations

import argparse
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from cads.accounting.ledger import Ledger
from cads.cli.data_flags import task_of_flags
from cads.cli.main import main
from cads.launch.launcher import WAITS
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.runtime import versions
from cads.selection import Selection
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from tests.support.paths import ROOT
from tests.support.sharded_pools import FILES, OUTPUTS, in_shards, merged, quick_commands, shard, write_pool

METHODS = {
    "bm25": {},
    "ppl": {"fine_tune": 3.0},
    "rho": {"pool_passes": 0, "target_passes": 3},
    "embedding": {},
    "less": {"warmup_share": 0.2, "checkpoints": 2},
    "cads": {},
}
"""A method of each kind of scoring, with its options."""


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_commands():
        yield


@pytest.mark.parametrize(("method", "options"), METHODS.items(), ids=list(METHODS))
def test_bytes_are_those_of_one_machine(tmp_path, method, options):
    config = write_pool(tmp_path, method, **options)
    assert in_shards(config, tmp_path / "one", 1) == in_shards(config, tmp_path / "two", 2)
    selection = Selection.load(tmp_path / "two")
    assert selection.notes["pool_examples"] == 24 * FILES
    assert 0 < len(selection.ids) < 24 * FILES
    assert selection.effective_share == pytest.approx(len(selection.ids) / (24 * FILES))


@pytest.mark.parametrize("method", ["bm25", "ppl", "embedding", "random"])
def test_scores_and_costs_are_those_of_the_whole_pool_in_memory(tmp_path, method):
    config = write_pool(tmp_path, method, ids=True)
    in_shards(config, tmp_path / "shards", 2)
    read = yaml.safe_load(config.read_text())["task"]
    entry = read["pool"][0]
    pool = [
        TextSource(name="pool", path=str(path), columns=entry["columns"])
        for path in sorted((tmp_path / "pool").iterdir())
    ]
    held_out = {name: [TextSource(path=read[name][0]["path"])] for name in ("target", "test")}
    task = LanguageConfig(model=read["model"], pool=pool, **held_out).build(TrainConfig(batch_size=8))
    ledger = Ledger()
    ranking = build_selector(method, {}).rank(task, seed=0, ledger=ledger)
    score = dict(zip(ranking.ids.to_pylist(), ranking.score, strict=True))
    selection = Selection.load(tmp_path / "shards")
    expected = np.array([score[i] for i in selection.ids.to_pylist()])
    if method in ("bm25", "random"):
        assert (selection.score == expected).all()
    else:
        assert selection.score == pytest.approx(expected, abs=1e-5)
    best = sorted(score.values(), reverse=True)[: len(selection.ids)]
    assert selection.score == pytest.approx(best, abs=1e-5)
    # Files are padded apart, so that passes of a model may differ a little.
    assert selection.ledger.total().flops == pytest.approx(ledger.total().flops, rel=0.1 if ledger.entries else 0)


class TestRounds:
    def test_a_shard_waits_for_surveys_of_others_and_skips_what_is_done(self, tmp_path, capfd):
        config, out = write_pool(tmp_path), tmp_path / "out"
        assert shard(config, out, "1/2") == WAITS
        assert "are not" in capfd.readouterr().err
        assert merged(config, out) == WAITS
        assert shard(config, out, "2/2") == 0
        before = {path: path.stat().st_mtime_ns for path in (out / "shards").rglob("*.parquet")}
        assert shard(config, out, "2/2") == shard(config, out, "1/2") == 0
        after = {path: path.stat().st_mtime_ns for path in (out / "shards").rglob("*.parquet")}
        assert before.items() <= after.items()
        assert merged(config, out) == 0

    def test_a_missing_file_is_named_when_merging(self, tmp_path, capfd):
        config, out = write_pool(tmp_path, "random"), tmp_path / "out"
        assert shard(config, out, "1/2") == 0
        assert merged(config, out) == WAITS
        assert "files have not been scored, such as" in capfd.readouterr().err

    def test_another_number_of_shards_goes_on_with_what_a_killed_one_has_left(self, random_run, tmp_path):
        config, out = random_run / "config.yaml", tmp_path / "out"
        shard(config, out, "1/2")
        half = out / "shards" / "values" / ".pool-part-0.jsonl-x"
        half.mkdir(parents=True)
        (half / "table.parquet").write_bytes(b"PAR1")
        whole = [(random_run / "out" / "selection" / name).read_bytes() for name in OUTPUTS]
        assert in_shards(config, out, 3) == whole

    def test_budget_and_cut_are_asked_for_when_merging(self, random_run, tmp_path):
        out = tmp_path / "out"
        shutil.copytree(random_run / "out", out)
        assert merged(random_run / "config.yaml", out, "--options.fraction", "0.1") == 0
        assert len(Selection.load(out).ids) == pytest.approx(0.1 * 24 * FILES, abs=2)


@pytest.fixture(scope="module")
def random_run(tmp_path_factory):
    """A folder with a finished run of `random` in `out`, and one of another seed in `other`."""
    folder = tmp_path_factory.mktemp("random")
    config = write_pool(folder, "random")
    in_shards(config, folder / "out", 1)
    in_shards(config, folder / "other", 1, "--seed", "1")
    return folder


class TestRefused:
    @pytest.fixture
    def done(self, random_run):
        """The run, as it was before the test."""
        shutil.copytree(random_run, random_run.with_name("kept"))
        yield random_run / "config.yaml", random_run / "out"
        shutil.rmtree(random_run)
        random_run.with_name("kept").rename(random_run)

    def test_another_configuration(self, done, capfd):
        config, out = done
        assert shard(config, out, "1/1", "--seed", "1") == 1
        assert "settings.seed was 0, now 1" in capfd.readouterr().err.replace("\n", " ")

    def test_other_code(self, done, capfd, monkeypatch):
        config, out = done
        monkeypatch.setattr("cads.cli.sharded_select.source_digest", lambda packages: "other")
        assert versions.source_digest({"cads"}) != "other"
        assert merged(config, out) == 1
        assert "now 'other'" in capfd.readouterr().err.replace("\n", " ")

    def test_other_data(self, done, capfd):
        config, out = done
        with (out.parent / "pool" / "part-2.jsonl").open("a") as file:
            file.write('{"prompt": "one more", "response": "yes", "source": "right", "kind": "small"}\n')
        assert shard(config, out, "1/1") == 1
        assert "the file pool/part-2.jsonl has changed" in capfd.readouterr().err.replace("\n", " ")

    def test_a_shard_of_another_run_by_its_name(self, done, capfd):
        config, out = done
        name = next(path.name for path in (out / "shards" / "values").iterdir() if "part-3" in path.name)
        shutil.rmtree(out / "shards" / "values" / name)
        shutil.copytree(out.parent / "other" / "shards" / "values" / name, out / "shards" / "values" / name)
        assert merged(config, out) == 1
        error = capfd.readouterr().err.replace("\n", "")
        assert name in error
        assert "settings.seed was 1, now 0" in error.replace("  ", " ")

    def test_a_shard_of_no_file(self, done, capfd):
        config, out = done
        (out / "shards" / "values" / "stray-1234").mkdir()
        assert merged(config, out) == 1
        assert "stray-1234" in capfd.readouterr().err.replace("\n", "")

    @pytest.mark.parametrize("change", ["cut", "rows"])
    def test_a_damaged_shard_by_its_name(self, done, capfd, change):
        config, out = done
        folder = sorted((out / "shards" / "values").iterdir())[1]
        table = folder / "table.parquet"
        if change == "cut":
            table.write_bytes(table.read_bytes()[:-8])
        else:
            pq.write_table(pq.read_table(table).slice(1), table)
            header = json.loads((folder / "part.json").read_text())
            (folder / "part.json").write_text(json.dumps({**header, "bytes": table.stat().st_size}))
        assert merged(config, out) == 1
        error = capfd.readouterr().err.replace("\n", "")
        assert folder.name in error
        assert "damaged" in error

    @pytest.mark.parametrize(
        ("flags", "reason"),
        [
            (["--method", "full"], "cannot be scored in shards"),
            (["--method", "ppl", "--options.recipe", "paper"], "recipe = cads"),
            (["--method", "embedding", "--options.clusters", "2"], "clusters"),
            (["--method", "rho"], "give 0"),
            (["--task.n_pool", "10"], "n_pool"),
            (["--task.target", "[]"], "target"),
            (["--overwrite", "true"], "remove"),
            (["--budget", "5 minutes"], "give FLOPs"),
            (["--merge"], "give one of them"),
            (["--workers", "2"], "without effect without a launcher"),
        ],
    )
    def test_what_needs_the_whole_pool_before_anything_is_read(self, tmp_path, capfd, flags, reason):
        config = write_pool(tmp_path)
        try:
            status = shard(config, tmp_path / "out", "1/2", *flags)
        except SystemExit as end:
            status = end.code
        assert status in (1, 2)
        assert reason in capfd.readouterr().err.replace("\n", " ")
        assert not (tmp_path / "out").exists()

    def test_a_budget_that_scoring_would_exceed(self, tmp_path, capfd):
        config = write_pool(tmp_path, "ppl")
        flags = ("--budget", "3e7", "--count_selection", "true")
        assert shard(config, tmp_path / "out", "1/2", *flags) == 1
        assert "would spend about" in capfd.readouterr().err.replace("\n", " ")
        assert not (tmp_path / "out" / "shards" / "values").exists()

    def test_leaks_of_all_files_together(self, tmp_path, capfd):
        config = write_pool(tmp_path, "random")
        target = (tmp_path / "target.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in target for _ in range(9)]
        for i, row in enumerate(rows):
            row |= {"id": f"t{i}", "prompt": f"{row['prompt']} {i}"}
        (tmp_path / "target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for i in (0, 2, 4):
            with (tmp_path / "pool" / f"part-{i}.jsonl").open("a") as file:
                file.write(json.dumps({k: v for k, v in rows[i].items() if k != "id"}) + "\n")
        for i in (1, 2):
            assert shard(config, tmp_path / "out", f"{i}/2") == 0
        assert merged(config, tmp_path / "out") == 1
        assert "3 of 270 target examples have exact copies" in capfd.readouterr().err.replace("\n", " ")


def test_the_chosen_rows_are_exported(tmp_path):
    config = write_pool(tmp_path)
    in_shards(config, tmp_path / "out", 2)
    assert main(["export", str(tmp_path / "out"), "--to", "jsonl", "--output", str(tmp_path / "chosen.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    selection = Selection.load(tmp_path / "out")
    assert len(rows) == len(selection.ids)
    assert {row["source"] for row in rows} <= {"right", "wrong"}


def test_entries_are_sources(tmp_path):
    config = write_pool(tmp_path, "random")
    read = yaml.safe_load(config.read_text())
    columns = {"prompt": "prompt", "response": "response"}
    read["task"]["pool"] = [
        {"name": f"source {i}", "path": str(path), "columns": columns}
        for i, path in enumerate(sorted((tmp_path / "pool").iterdir()))
    ]
    config.write_text(yaml.safe_dump(read))
    assert in_shards(config, tmp_path / "one", 1) == in_shards(config, tmp_path / "two", 2)
    names = set(Selection.load(tmp_path / "two").sources.to_pylist())
    assert names == {f"source {i}" for i in range(FILES)}


def test_a_remote_folder_gives_the_same_scores(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    config = write_pool(tmp_path)
    local = in_shards(config, tmp_path / "local", 1)
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "pool"), "/bucket/pool", recursive=True)
    try:
        read = yaml.safe_load(config.read_text())
        read["task"]["pool"][0]["path"] = "memory://bucket/pool"
        config.write_text(yaml.safe_dump(read))
        remote = in_shards(config, tmp_path / "remote", 2)
    finally:
        store.rm("/bucket", recursive=True)
    assert remote[1:] == local[1:]
    files = json.loads(remote[0])["files"]
    assert all(file["location"].startswith("memory://") for file in files)
    assert [f["digest"] for f in files] == [f["digest"] for f in json.loads(local[0])["files"]]


def test_flags_of_launchers_are_not_silently_unused(tmp_path, capfd):
    assert main(["select", str(write_pool(tmp_path)), "--out", str(tmp_path / "out"), "--workers", "2"]) == 1
    assert "without effect without a launcher" in capfd.readouterr().err.replace("\n", " ")


def test_folders_of_texts_and_addresses_are_named_by_flags_too(tmp_path):
    write_pool(tmp_path)
    (tmp_path / "images" / "cats").mkdir(parents=True)
    (tmp_path / "images" / "metadata.jsonl").write_text("{}")
    for pool, kind in (("pool", "language"), ("images", "vision")):
        words = argparse.Namespace(pool=[str(tmp_path / pool)])
        assert task_of_flags(words)["kind"] == kind
    remote = task_of_flags(argparse.Namespace(pool=["s3://bucket/pool"], target=str(tmp_path / "target.jsonl")))
    assert remote["pool"] == [{"path": "s3://bucket/pool"}]


def test_an_address_that_is_not_read_in_shards_is_refused_with_the_way(tmp_path, capfd):
    config = write_pool(tmp_path)
    read = yaml.safe_load(config.read_text())
    read["task"]["pool"] = [{"path": "s3://bucket/pool"}]
    config.write_text(yaml.safe_dump(read))
    assert main(["select", str(config), "--out", str(tmp_path / "out")]) == 1
    assert "read in shards alone" in capfd.readouterr().err.replace("\n", " ")


def test_the_commands_of_the_page_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "clusters.md").read_text()
    by_shard, by_merging, by_launcher = re.findall(r"^    cads (select CONFIG .*)$", page, re.MULTILINE)
    config = str(write_pool(tmp_path, "random"))
    for command in (by_shard.replace("1/64", "1/1"), by_merging):
        assert main(command.replace("CONFIG", config).split()) == 0
    assert len(Selection.load(tmp_path / "runs" / "big").ids)
    assert "--launcher local" in by_launcher
