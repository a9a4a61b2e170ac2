"""Exports: the chosen rows with the values of the user's files, and their weights, whatever the files are."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import re
import shutil
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import cads
from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.cli.main import main
from cads.errors import ConfigError, DataError, SelectionError
from cads.recipe import TrainConfig
from cads.selection import Selection
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from tests.support.paths import ROOT
from tests.support.tiny_llama import model_folder

EXACT = ["1.50", "0.1000000000000000055511151231257827", "1e400", "-0.0", "12345678901234567890"]
"""Numbers that a reader of numbers would change."""


def raw(name, i):
    """A line of a JSON file: digits, objects of different keys, and characters beyond ASCII."""
    more = f', "meta": {{"tags": ["é", {i}], "by{i % 2}": null}}' if i % 3 else ""
    return f'{{"prompt": "{name} {i}?", "response": "{i % 7}", "score": {EXACT[i % 5]}, "n": {i}{more}}}'


def write_files(folder):
    """Two JSON files without ids of the same name, a CSV file and a Parquet file, both with ids."""
    for part, name in ((folder, "a"), (folder / "sub", "b")):
        part.mkdir(parents=True, exist_ok=True)
        (part / "same.jsonl").write_text("".join(raw(name, i) + "\n" for i in range(40)))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "response", "code"])
        writer.writerows([f"c{i}", f"c {i}, or not?", "NA" if i == 3 else "1.50", f"00{i}"] for i in range(30))
    columns = {
        "id": [f"p{i}" for i in range(30)],
        "prompt": [f"p {i}?" for i in range(30)],
        "response": ["yes"] * 30,
        "day": [datetime.date(2024, 1, 1 + i) for i in range(30)],
        "x": pa.array([i / 3 for i in range(30)], pa.float32()),
    }
    pq.write_table(pa.table(columns), folder / "table.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def folder(tmp_path):
    return write_files(tmp_path / "data")


JSON, TABLES = ("same.jsonl", "sub/same.jsonl"), ("table.csv", "table.parquet")


def pool_of(model, folder, files, **options):
    sources = [TextSource(name=f"s{i}", path=str(folder / name), **options) for i, name in enumerate(files)]
    config = LanguageConfig(model=str(model), pool=sources, n_target=8, n_test=8)
    return config.build(TrainConfig(batch_size=8)).pool


def chosen(pool, **fields):
    """Every third example; with `weighted`, one source of two four times as likely as the other."""
    selected = np.arange(len(pool)) % 3 == 0
    probability = np.where(pool.sources == 0, 0.8, 0.2) if fields.get("weighted") else None
    return Selection.from_pool(
        pool, selected=selected, method="thirds", seed=0, budget=Budget(1, "epochs"), ledger=Ledger(),
        probability=probability, **fields,
    )  # fmt: skip


def places(selection):
    """File and row of each chosen example, in order, with its source and weight."""
    names = selection.sources.cast(pa.string()).to_pylist()
    result = [
        (int(selection.origin.file[i]), int(selection.origin.row[i]), names[i], float(selection.weights[i]))
        for i in np.flatnonzero(selection.selected)
    ]
    return sorted(result)


def lines(path):
    return path.read_text().splitlines()


class Exactly(json.JSONDecoder):
    """Reads numbers as the text that they are written as."""

    def __init__(self):
        super().__init__(parse_float=lambda text: ("number", text), parse_int=lambda text: ("number", text))


def exact(line):
    return json.loads(line, cls=Exactly)


@pytest.mark.parametrize("weighted", [False, True])
def test_json_rows_are_those_of_the_files_digit_by_digit(model, folder, weighted):
    selection = chosen(pool_of(model, folder, JSON), weighted=weighted)
    out = folder / "out.jsonl"
    assert cads.export(selection, out) == len(lines(out)) == selection.selected.sum()
    sources = [lines(folder / name) for name in JSON]
    for line, (file, row, source, weight) in zip(lines(out), places(selection), strict=True):
        got = exact(line)
        assert got.pop("weight") == ("number", repr(weight))
        assert got.pop("source") == source == f"s{file}"
        assert list(got.items()) == list(exact(sources[file][row]).items())
    assert sum(json.loads(line)["weight"] for line in lines(out)) == pytest.approx(1)
    by_source = Counter()
    for line in lines(out):
        by_source[json.loads(line)["source"]] += json.loads(line)["weight"]
    assert dict(by_source) == pytest.approx(selection.shares)


def test_csv_stays_text_and_columns_keep_their_types(model, folder):
    selection = chosen(pool_of(model, folder, TABLES))
    cads.export(selection, folder / "out.parquet", to="parquet")
    cads.export(selection, folder / "out.jsonl")
    with (folder / "table.csv").open(newline="") as file:
        csv_rows = list(csv.DictReader(file))
    sources = [csv_rows, pq.read_table(folder / "table.parquet").to_pylist()]
    table = pq.read_table(folder / "out.parquet")
    types = {"code": pa.string(), "day": pa.date32(), "x": pa.float32(), "weight": pa.float64(), "source": pa.string()}
    assert {name: table.schema.field(name).type for name in types} == types
    wanted = places(selection)
    for got, line, (file, row, source, weight) in zip(
        table.to_pylist(), lines(folder / "out.jsonl"), wanted, strict=True
    ):
        assert {k: v for k, v in got.items() if v is not None} == {
            **sources[file][row],
            "weight": weight,
            "source": source,
        }
        as_json = json.loads(line)
        assert {k: str(v) for k, v in as_json.items()} == {
            **{k: str(v) for k, v in sources[file][row].items()},
            "weight": str(weight),
            "source": source,
        }


def test_all_forms_of_the_same_rows_give_the_same_export(model, folder):
    text = (folder / JSON[0]).read_text()
    rows = [{k: v for k, v in json.loads(line).items() if k in ("prompt", "response")} for line in text.splitlines()]
    (folder / "zipped.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "list.json").write_text(f"[{', '.join(text.splitlines())}]")
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    pq.write_table(pa.Table.from_pylist(rows), folder / "plain.parquet")
    selection = chosen(pool_of(model, folder, JSON))
    cads.export(selection, folder / "lines")
    others = selection.origin.files[1]
    for name in ("zipped.jsonl.gz", "list.json", "saved", "plain.parquet"):
        cads.export(selection, folder / "other", files=[folder / name, others.location], overwrite=True)
        got, wanted = ([exact(line) for line in lines(folder / file)] for file in ("other", "lines"))
        if name in ("saved", "plain.parquet"):
            columns = ("prompt", "response", "weight", "source")
            wanted = [
                {k: v for k, v in row.items() if k in columns} if row["source"] == "s0" else row for row in wanted
            ]
        assert got == wanted, name


def test_json_becomes_parquet_where_types_agree_and_is_refused_where_not(model, folder):
    good = [{"prompt": f"{i}?", "response": "r", "meta": {f"k{i % 2}": [i]}, "x": i or 0.5} for i in range(40)]
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    selection = chosen(pool_of(model, folder, ["good.jsonl", "table.csv"]))
    cads.export(selection, folder / "out.parquet", to="parquet")
    got = pq.read_table(folder / "out.parquet").to_pylist()
    for row, (file, position, _, _) in zip(got, places(selection), strict=True):
        if file == 0:
            own = good[position]
            assert row["x"] == own["x"]
            assert {k: v for k, v in row["meta"].items() if v is not None} == own["meta"]
    mixed = [{**row, "x": "text" if i % 2 else i} for i, row in enumerate(good)]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    selection = chosen(pool_of(model, folder, ["mixed.jsonl", "table.csv"]))
    with pytest.raises(DataError, match="use --to jsonl"):
        cads.export(selection, folder / "mixed.parquet", to="parquet")
    assert not [path for path in folder.iterdir() if "mixed.parquet" in path.name], "nothing half-written is left"


def test_resampled_rows_repeat_in_proportion_to_their_weights(model, folder):
    selection = chosen(pool_of(model, folder, JSON), weighted=True)
    out, drawn, n = folder / "out.jsonl", Counter(), int(selection.selected.sum())
    for seed in range(60):
        assert cads.export(selection, out, weights="resample", seed=seed, overwrite=True) == n
        rows = [json.loads(line) for line in lines(out)]
        assert all("weight" not in row for row in rows)
        drawn.update(row["prompt"] for row in rows)
    by_source = {"s0": 0, "s1": 0}
    for prompt, count in drawn.items():
        by_source["s0" if prompt.startswith("a") else "s1"] += count
    total = sum(by_source.values())
    assert total == 60 * n
    for name, share in selection.shares.items():
        assert by_source[name] / total == pytest.approx(share, abs=5 * np.sqrt(0.25 / total))


def test_equal_weights_are_not_resampled(model, folder):
    selection, out = chosen(pool_of(model, folder, JSON)), folder / "out.jsonl"
    cads.export(selection, out, weights="resample", source_column=None)
    sources = [lines(folder / name) for name in JSON]
    assert [exact(line) for line in lines(out)] == [exact(sources[f][r]) for f, r, _, _ in places(selection)]


def test_files_that_have_moved_are_found_by_their_contents(model, folder, tmp_path, caplog):
    selection = Selection.load(chosen(pool_of(model, folder, JSON), weighted=True).save(tmp_path / "s"))
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    caplog.clear()
    cads.export(selection, before)
    folder.rename(tmp_path / "moved")
    with pytest.raises(SelectionError, match=r"same\.jsonl.*does not exist here: give the files where they are now"):
        cads.export(selection, after)
    moved = [tmp_path / "moved" / name for name in JSON]
    shutil.move(moved[0], tmp_path / "other.json")
    cads.export(selection, after, files=[moved[1], tmp_path / "other.json"])
    assert after.read_bytes() == before.read_bytes()
    assert not caplog.records
    cads.export(selection, after, files=[moved[1]], overwrite=True)
    assert lines(after) == [line for line in lines(before) if json.loads(line)["source"] == "s1"]
    assert "1 of 2 files with selected examples are not given" in caplog.text


@pytest.mark.parametrize("change", ["value", "order", "one less"])
def test_changed_files_are_refused(model, folder, change):
    selection = chosen(pool_of(model, folder, JSON))
    file = folder / JSON[0]
    rows = lines(file)
    changed = {"value": [rows[0].replace("a 0?", "a 1?"), *rows[1:]], "order": rows[::-1], "one less": rows[:-1]}
    file.write_text("\n".join(changed[change]) + "\n")
    with pytest.raises(SelectionError, match="is not what the pool was read from"):
        cads.export(selection, folder / "out.jsonl")
    with pytest.raises(SelectionError, match="is none of the files that the pool was read from"):
        cads.export(selection, folder / "out.jsonl", files=[file])
    assert not (folder / "out.jsonl").exists()


def test_of_files_with_equal_contents_each_is_the_one_of_its_name(model, folder):
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_text("".join(raw("a", i) + "\n" for i in range(40)))
    selection = chosen(pool_of(model, folder, ["one.jsonl", "two.jsonl"]))
    cads.export(selection, folder / "out.jsonl")
    cads.export(selection, folder / "again.jsonl", files=[folder / "two.jsonl", folder / "one.jsonl"])
    assert lines(folder / "again.jsonl") == lines(folder / "out.jsonl")
    with pytest.raises(SelectionError, match="have the same contents"):
        cads.export(selection, folder / "one-alone.jsonl", files=[folder / "two.jsonl"])


def test_own_columns_of_the_same_name_stay_if_they_say_the_same(model, folder):
    rows = [{"prompt": f"{i}?", "response": "r", "source": "ab"[i % 2], "weight": 3} for i in range(60)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    selection, out = chosen(pool_of(model, folder, ["own.jsonl"])), folder / "out.jsonl"
    assert set(selection.shares) == {"a", "b"}, "the column is the source of each row"
    with pytest.raises(SelectionError, match=r"column 'weight' of its own, with 3.*--weight_column cads_weight"):
        cads.export(selection, out)
    cads.export(selection, out, weight_column="share")
    got = [json.loads(line) for line in lines(out)]
    assert all(list(row) == ["prompt", "response", "source", "weight", "share"] for row in got)
    assert [row["source"] for row in got] == [source for _, _, source, _ in places(selection)]
    assert sum(row["share"] for row in got) == pytest.approx(1)
    cads.export(selection, out, weight_column=None, overwrite=True)
    assert [json.loads(line) for line in lines(out)] == [rows[r] for _, r, _, _ in places(selection)]
    several = chosen(pool_of(model, folder, ["own.jsonl", "table.csv"]))
    with pytest.raises(SelectionError, match=r"column 'source' of its own, with '[ab]'.*is 's0'.*--source_column null"):
        cads.export(several, out, weight_column=None, overwrite=True)
    assert len(lines(out)) == selection.selected.sum(), "what was there before is kept"


def test_what_cannot_be_exported_is_refused_with_the_remedy(model, folder):
    pool, out = pool_of(model, folder, JSON), folder / "out.jsonl"
    nothing = Selection.from_pool(
        pool, selected=np.zeros(len(pool), dtype=bool), method="target-only", seed=0, budget=Budget(1, "epochs"),
        ledger=Ledger(), target_fraction=1.0,
    )  # fmt: skip
    with pytest.raises(SelectionError, match=r"selected nothing of the pool.*use the rows of the target"):
        cads.export(nothing, out)
    selection = chosen(pool)
    with pytest.raises(SelectionError, match="holds no images: use --to jsonl"):
        cads.export(selection, out, to="files")
    for name, value, message in (
        ("to", "csv", "to = 'csv': choose from"),
        ("source_column", "weight", "give them different names"),
    ):
        with pytest.raises(ConfigError, match=message):
            cads.export(selection, out, **{name: value})
    with pytest.raises(ConfigError, match="is a file of the pool itself"):
        cads.export(selection, folder / JSON[1], overwrite=True)
    out.write_text("mine")
    with pytest.raises(ConfigError, match="exists: name another, or replace it by --overwrite true"):
        cads.export(selection, out)
    assert out.read_text() == "mine"
    for path, message in ((folder, "is a folder"), (folder / "x.jsonl.gz", "exports are not compressed")):
        with pytest.raises(ConfigError, match=message):
            cads.export(selection, path)
    selection.origin = None
    with pytest.raises(SelectionError, match=r"does not say in which files.*selection\.apply"):
        cads.export(selection, folder / "new.jsonl")


def test_rows_of_the_hub_are_chosen_in_python(model, folder):
    selection = chosen(pool_of(model, folder, JSON))
    for file in selection.origin.files:
        object.__setattr__(file, "location", "someone/chats")
    with pytest.raises(SelectionError, match=r"someone/chats.*data set of the hub.*selection\.apply"):
        cads.export(selection, folder / "out.jsonl")


@pytest.fixture
def images(tmp_path):
    """Two sources of two classes of images."""
    rng = np.random.default_rng(0)
    for source in ("x", "y"):
        for name in ("cat", "dog"):
            image_path = tmp_path / "images" / "train" / source / name
            image_path.mkdir(parents=True)
            for i in range(12):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(image_path / f"{i} é.png")
    return tmp_path / "images"


def test_a_list_of_images_names_the_files_of_the_folder(images, tmp_path):
    task = VisionConfig(dataset="folder", path=str(images), hidden=8, n_target=6, n_test=6).build(TrainConfig())
    out = tmp_path / "lists" / "images.txt"
    equal, weighted = chosen(task.pool), chosen(task.pool, weighted=True)
    names = equal.ids.filter(pa.array(equal.selected)).to_pylist()
    assert cads.export(equal, out, to="files") == len(names)
    assert lines(out) == names
    assert all((images / name).is_file() for name in lines(out))
    cads.export(weighted, out, to="files", files=[images], overwrite=True)
    pairs = [line.split("\t") for line in lines(out)]
    assert [(name, float(w)) for name, w in pairs] == list(zip(names, weighted.weights[weighted.selected], strict=True))
    assert sum(float(w) for _, w in pairs) == pytest.approx(1)
    cads.export(weighted, out, to="files", weights="resample", overwrite=True)
    assert len(lines(out)) == len(names)
    assert set(lines(out)) <= set(names)
    (images / names[0]).unlink()
    with pytest.raises(SelectionError, match=r"1 of \d+ images are not in"):
        cads.export(equal, out, to="files", files=[images], overwrite=True)
    with pytest.raises(SelectionError, match="are listed by --to files"):
        cads.export(equal, tmp_path / "out.jsonl")


def test_pools_that_are_no_folder_of_images_are_not_listed(tmp_path):
    sources = [SyntheticSource("a"), SyntheticSource("b")]
    task = VisionConfig(n_pool=80, n_target=20, n_test=20, sources=sources).build(TrainConfig())
    with pytest.raises(SelectionError, match=r"no paths of images, such as \['train-"):
        cads.export(chosen(task.pool), tmp_path / "list", to="files")


class TestCommand:
    @pytest.fixture
    def run(self, model, folder, tmp_path):
        """A run of `cads select` on two files."""
        pool = [{"path": str(folder / name)} for name in JSON]
        config = {"kind": "language", "task": {"model": str(model), "pool": pool, "n_target": 8, "n_test": 8}}
        (tmp_path / "c.yaml").write_text(json.dumps({**config, "method": "random", "budget": "2000 tokens"}))
        quiet = ("--progress", "false", "--tensorboard", "false", "--options.fraction", "0.5")
        assert main(["select", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run"), *quiet]) == 0
        return tmp_path / "run"

    def test_it_writes_what_python_writes_and_takes_flags_in_any_place(self, run, folder, tmp_path, capsys):
        selection = Selection.load(run)
        count = cads.export(selection, tmp_path / "python.jsonl")
        files, out = [str(folder / name) for name in JSON], str(tmp_path / "command.jsonl")
        flags = ["--to", "jsonl", "--output", out, "--overwrite", "true"]
        for words in ([str(run), *flags], [*flags, str(run), *files], [str(run), *flags, *files]):
            capsys.readouterr()
            assert main(["export", *words]) == 0
            assert f"{count} rows: {out}" in capsys.readouterr().out
            assert (tmp_path / "command.jsonl").read_bytes() == (tmp_path / "python.jsonl").read_bytes()
        assert main(["export", str(run), *flags, "--weight_column", "null", "--source_column", "null"]) == 0
        assert not {"weight", "source"} & set(json.loads(lines(tmp_path / "command.jsonl")[0]))

    def test_the_command_of_the_page_runs(self, run, monkeypatch):
        commands = re.findall(r"`(cads export RUN [^`]*)`", (ROOT / "docs" / "export.md").read_text())
        assert commands
        monkeypatch.chdir(run.parent)
        for command in commands:
            words = command.replace("RUN", str(run)).split()[1:]
            assert main(words) == 0
            assert (run.parent / words[words.index("--output") + 1]).exists()

    @pytest.mark.parametrize(
        ("words", "status", "message"),
        [
            ("--output x.jsonl", 2, "to"),
            ("--to jsonl", 2, "output"),
            ("--to csv --output x", 2, "jsonl"),
            ("--to jsonl --output x --colour red", 2, "colour is unknown"),
            ("--to jsonl --output x --weights", 2, "expected one argument"),
            ("--to jsonl --output x nowhere.jsonl", 1, "nowhere.jsonl does not exist"),
            ("--to files --output x", 1, "holds no images"),
        ],
    )
    def test_what_is_wrong_is_said(self, run, tmp_path, capsys, monkeypatch, words, status, message):
        monkeypatch.chdir(tmp_path)
        try:
            result = main(["export", str(run), *words.split()])
        except SystemExit as exit_:
            result = exit_.code
        assert result == status
        errors = " ".join(capsys.readouterr().err.split())
        assert message in errors
        assert "Traceback" not in errors
        assert not list(tmp_path.glob("x*"))

    def test_a_missing_selection_is_said(self, capsys):
        assert main(["export", "/nowhere", "--to", "jsonl", "--output", "x"]) == 1
        assert "does not exist" in " ".join(capsys.readouterr().err.split())

    def test_a_run_on_synthetic_sources_of_a_folder_is_not_listed(self, images, tmp_path, capsys):
        task = {"dataset": "folder", "path": str(images), "hidden": 8, "n_target": 6, "n_test": 6}
        config = {"task": {**task, "sources": [{"name": "a"}, {"name": "b", "label_noise": 0.9}]}, "method": "random"}
        (tmp_path / "c.yaml").write_text(json.dumps({**config, "budget": "2 epochs", "train": {"batch_size": 4}}))
        quiet = ("--progress", "false", "--tensorboard", "false")
        assert main(["select", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run"), *quiet]) == 0
        assert main(["export", str(tmp_path / "run"), "--to", "files", "--output", str(tmp_path / "list")]) == 1
        assert "synthetic sources" in " ".join(capsys.readouterr().err.split())

    def test_every_flag_is_explained(self, capsys):
        with pytest.raises(SystemExit) as exit_:
            main(["export", "--help"])
        assert exit_.value.code == 0
        help_text = " ".join(capsys.readouterr().out.split())
        for text in ("SELECTION", "FILES", "--to", "Replace the output", "Of the draws of resample"):
            assert text in help_text
