"""The published vision setting: its grid is read, run small in both accountings, and reported from its cells alone."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cads.errors import ConfigError, DataError
from cads.study.grid import read_grid
from experiments import cifar10
from experiments.cifar10 import CONFIG, main, methods, passes, worlds, write_arrays
from experiments.cifar10_report import read_places

GRID = """
task:
  dataset: digits
  n_target: 60
  n_test: 200
  sources:
    - {name: clean, size: 100}
    - {name: noisy, size: 100, label_noise: 0.8}
train: {batch_size: 16, learning_rate: 0.005}
models:
  - {label: small, task: {hidden: 16}}
budgets: [1 epochs, 5 epochs]
seeds: 2
methods:
  - full
  - joint
  - {method: source, label: only clean, options: {name: clean}}
  - {method: source, label: only noisy, options: {name: noisy}}
  - cads
  - best-source
  - {method: best-source, count_selection: false}
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar10")
    (folder / "grid.yaml").write_text(GRID)
    arguments = ["--out", str(folder), "--config", str(folder / "grid.yaml")]
    main(arguments)
    main([*arguments, "--results", str(folder / "page.md")])
    return folder


def rows(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def test_the_published_grid():
    grid = read_grid(CONFIG)
    assert passes(grid) == [1, 5, 20]
    for world in worlds(grid).values():
        assert [source.label_noise for source in world.task.sources] == [0, 0.225, 0.45, 0.675, 0.9]
        assert world.task.sizes(50_000, 10_000) == (10_000, 5_000, 45_000)
    residual = ["resnet8", "resnet8 of 16 channels"]
    assert set(worlds(grid)) == {"cnn", *residual, *(f"{name}, crops and flips" for name in residual)}
    names = [m.name for m in methods(grid)]
    assert names[-5:] == [cifar10.BEST_RIVAL, *cifar10.PARTS, cifar10.CLEAN_AND_TARGET]
    assert {m.name for m in methods(grid) if m.on_top} == {
        f"{name}, on top" for name in ("search", "cads-s-penalty", "cads-e-penalty")
    }


def test_selection_is_paid_from_the_budget_or_on_top(out):
    spent = {}
    for row in rows(out):
        if "error" not in row:
            spent.setdefault(row["key"][4], []).append((row["select"], row["train"], row["budget"]))
    for name, costs in spent.items():
        for select, train, budget in costs:
            assert train <= budget
            assert name.endswith("on top") or select + train <= budget
    assert all(select and select + train > budget for select, train, budget in spent["best-source, on top"])


def test_the_clean_source_comes_with_the_target_by_their_sizes(out):
    (clean, *_) = (row for row in rows(out) if row["key"][4] == cifar10.CLEAN_AND_TARGET)
    assert clean["target"] == pytest.approx(60 / 160, abs=5e-4)
    assert clean["shares"] == {"clean": 1, "noisy": 0}
    assert not clean["select"]


def test_it_goes_on_where_it_was(out):
    before = (out / "cells.jsonl").read_text()
    main(["--out", str(out), "--config", str(out / "grid.yaml")])
    assert (out / "cells.jsonl").read_text() == before
    assert {tuple(row["key"][2:4]) for row in rows(out)} == {(p, s) for p in (1.0, 5.0) for s in (0, 1)}


def test_the_page_says_what_was_measured(out):
    text, (first, last) = (out / "page.md").read_text(), read_places(out / "cells.jsonl")
    assert (out / "page.jsonl").read_text() == (out / "cells.jsonl").read_text()
    accuracies = [row["accuracy"] for row in rows(out) if row["key"][2] == 5 and row["key"][4] == "full"]
    assert f"{100 * np.mean(accuracies):.2f} ±" in next(x for x in text.splitlines() if x.startswith("| full |"))
    difference = last.less("cads", "full")
    assert difference == pytest.approx(last.values("cads") - last.values("full"))
    aim = [line for line in text.splitlines() if line.startswith("| small | 5 |")]
    assert len(aim) == 1
    assert aim[0].endswith(f"{difference.mean():+.2f} ± {_half(difference):.2f} {_met(difference, 10)} |")
    best = last.best(["only clean", "only noisy"])
    assert last.values(best).mean() == max(last.values(n).mean() for n in ("only clean", "only noisy"))
    assert best in aim[0]
    assert first.cost("best-source, on top") > 1 >= first.cost("best-source")
    with Image.open(out / "page.png") as image:
        assert len(image.convert("RGB").getcolors(10**6)) > 20


def _half(values):
    return 12.706204736432095 * np.std(values, ddof=1) / np.sqrt(2)


def _met(values, aim):
    return "yes" if values.mean() >= aim else "**no**"


def test_what_was_not_run_is_named(out, tmp_path):
    kept = [row for row in rows(out) if row["key"][4] != "joint"]
    kept.append({"key": ["small", 60, 1.0, 0, "joint"], "error": "too little"})
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    main(["--out", str(tmp_path), "--config", str(out / "grid.yaml"), "--results", str(tmp_path / "page.md")])
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert next(x for x in lines if x.startswith("Not bought by the budget at 1 pass: ")).endswith("joint.")
    assert "Not run at 5 passes: joint." in lines
    assert not any("of the grid that were not run" in line for line in lines)
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept if row["key"][2] == 1))
    main(["--out", str(tmp_path), "--config", str(out / "grid.yaml"), "--results", str(tmp_path / "page.md")])
    assert "Models and budgets of the grid that were not run: small at 5 passes." in (tmp_path / "page.md").read_text()


def test_one_seed_has_no_interval(out, tmp_path):
    kept = [row for row in rows(out) if row["key"][3] == 0]
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    main(["--out", str(tmp_path), "--config", str(out / "grid.yaml"), "--results", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# page: 1 seed\n")
    assert "nan" not in text
    (accuracy,) = (row["accuracy"] for row in kept if row["key"][2] == 5 and row["key"][4] == "full")
    assert f"{100 * accuracy:.2f} (1)" in text


def test_a_page_of_too_little_is_refused(out, tmp_path):
    kept = [row for row in rows(out) if row["key"][4] != "cads"]
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    with pytest.raises(ConfigError, match="no cell of `cads`"):
        main(["--out", str(tmp_path), "--config", str(out / "grid.yaml"), "--results", str(tmp_path / "page.md")])


def parquet(path, images, labels):
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append({"bytes": file.getvalue()})
    pq.write_table(pa.table({"img": files, "label": labels}), path)


def test_parquet_files_become_arrays(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    parquet(tmp_path / "train.parquet", images[:4], [0, 1, 2, 1])
    parquet(tmp_path / "test.parquet", images[4:], [2, 0])
    write_arrays([tmp_path / "train.parquet", tmp_path / "test.parquet"], tmp_path / "images")
    for split, part, labels in (("train", images[:4], [0, 1, 2, 1]), ("test", images[4:], [2, 0])):
        assert np.array_equal(np.load(tmp_path / "images" / split / "images.npy"), part)
        assert np.load(tmp_path / "images" / split / "labels.npy").tolist() == labels


def test_a_file_that_is_no_such_parquet_is_refused(tmp_path):
    pq.write_table(pa.table({"label": [0]}), tmp_path / "one.parquet")
    with pytest.raises(DataError, match="needs the columns img and label"):
        write_arrays([tmp_path / "one.parquet"] * 2, tmp_path / "images")
    assert not (tmp_path / "images").exists()
