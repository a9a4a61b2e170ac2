"""The language experiments on tiny stand-ins: a grid from data to page, and published settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import GPT2Config, LlamaConfig

from cads.cli.main import main as cads
from cads.errors import ConfigError
from cads.study.grid import read_grid, settings
from cads.study.tables import read_runs
from experiments import corpora, language, language_report
from experiments.language import prepare
from experiments.language_data import data_config, read_sections
from tests.support.paths import CONFIGS
from tests.support.tiny_corpora import SOURCES
from tests.support.tiny_llama import conversations, model_folder, tokenizer, write_lines

pytestmark = pytest.mark.usefixtures("packages")


@pytest.fixture(scope="module")
def ran(world, tmp_path_factory):
    """The folder of an experiment that was run once: config.yaml, run/, page.md, models/."""
    folder = tmp_path_factory.mktemp("experiment")
    given = {
        "data": {
            "skill": "foldoc", "sources": SOURCES, "n_target": 20, "n_test": 10, "text": True,
            "dictionaries": str(world),
        },
        "pretraining": {
            "tokens": 4000, "vocabulary": 300,
            "ladder": {"tiny": {"hidden": 32, "layers": 1, "intermediate": 32}},
        },
        "sizes": ["tiny"],
        "task": {"max_tokens": 96},
        "train": {"batch_size": 4, "learning_rate": 0.003},
        "budgets": ["8 epochs"],
        "seeds": 2,
        "metric": "loss",
        "evaluations": ["choices"],
        "methods": [
            "full", "target-only", {"method": "search", "options": {"allowance": 1.0}},
            {"method": "cads", "count_selection": False},
        ],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(given))
    words = ["--out", folder / "run", "--models", folder / "models", "--results", folder / "page.md"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "_package", lambda corpus, name: world / name)
        assert language.main(list(map(str, [folder / "config.yaml", *words]))) == 0
    return folder


class TestExperiment:
    def test_totals_are_equal_where_the_budget_covers_selection(self, ran):
        found = read_runs(ran / "run")
        assert {r["status"] for r in found} == {"done"}
        assert len(found) == 8
        for row in found:
            if row["count_selection"]:
                assert row["total_flops"] <= row["budget_flops"]
            assert row["training_flops"] <= row["budget_flops"]
        assert any(r["selection_flops"] > 0 for r in found if r["method"] == "search")

    def test_seeds_draw_their_own_pool_and_the_same_test_set(self, ran):
        one, two = (s.config.split() for s in list(settings(read_grid(ran / "run" / "grid.yaml")))[:2])
        drawn = [{i for part in split.pool for i in part.ids.to_pylist()} for split in (one, two)]
        assert [len(d) for d in drawn] == [64, 64]
        assert drawn[0] != drawn[1]
        assert [p.ids for p in one.test] == [p.ids for p in two.test]

    def test_choices_are_measured_and_charged(self, ran):
        for row in read_runs(ran / "run"):
            assert 0 <= json.loads(row["metrics"])["choices"] <= 1
            spent = [r["flops"] for r in json.loads(row["ledger"]) if r["stage"] == "choices"]
            assert len(spent) == 1
            assert spent[0] > 0

    def test_the_report_says_what_was_found(self, ran):
        text = (ran / "page.md").read_text()
        for part in (
            "## Test loss",
            "## Multiple choice",
            "## Differences",
            "pretrained from scratch",
            "cads, on top",
        ):
            assert part in text
        header = next(line for line in text.splitlines() if "full pool returned" in line)
        assert all(s["name"] in header for s in SOURCES)

    def test_the_grid_it_leaves_is_one_of_cads_compare(self, ran, capsys):
        before = {p: p.stat().st_mtime_ns for p in (ran / "run" / "tables" / "runs").iterdir()}
        assert cads(["compare", str(ran / "run" / "grid.yaml"), "--out", str(ran / "run")]) == 0
        assert before == {p: p.stat().st_mtime_ns for p in (ran / "run" / "tables" / "runs").iterdir()}

    def test_an_unknown_evaluation_is_refused_before_anything_is_spent(self, ran, tmp_path, capsys):
        grid = yaml.safe_load((ran / "run" / "grid.yaml").read_text())
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**grid, "evaluations": ["taste"]}))
        assert cads(["compare", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")]) == 1
        assert "'taste' is unknown" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out" / "tables").exists()

    def test_models_are_found_by_their_size(self, ran):
        assert (ran / "run" / "models" / "tiny" / "config.json").exists()

    def test_bad_configs_spend_nothing(self, world, ran, tmp_path, capsys):
        given = yaml.safe_load((ran / "config.yaml").read_text())
        with pytest.raises(ConfigError, match="'7B'"):
            prepare(given, tmp_path / "out", sizes=["7B"])
        with pytest.raises(ConfigError, match="text: true"):
            prepare({**given, "data": {**given["data"], "text": False}}, tmp_path / "out")
        (tmp_path / "no-data.yaml").write_text("methods: [full]")
        assert language.main([str(tmp_path / "no-data.yaml"), "--out", str(tmp_path / "out")]) == 1
        assert "no section `data`" in " ".join(capsys.readouterr().out.split())
        assert not (tmp_path / "out").exists()


def test_examples_are_the_most_and_the_least_probable(tmp_path):
    from dataclasses import replace

    import pyarrow as pa

    from cads.accounting.budget import Budget
    from cads.accounting.ledger import Ledger
    from cads.selection import Selection

    n = 40
    probability = np.random.default_rng(0).permutation(n) / n
    made = Selection(
        ids=pa.array([f"e{i}" for i in range(n)]), score=probability, probability=probability,
        selected=probability > 0.5, sources=None, method="cads", seed=0, budget=Budget(1), ledger=Ledger(),
        pool_hash="",
    )  # fmt: skip
    made.save(tmp_path / "cells" / "c")
    replace(made, probability=np.ones(n)).save(tmp_path / "cells" / "everything")
    row = {"selector": "cads", "probability_course": '[{"x": 1}]', "seed": 0, "budget_flops": 1.0, "cell": "c"}
    row |= {"selection_flops_spent": 1.0, "method": "cads", "budget": "1 epochs"}
    dearer = row | {"cell": "everything", "selection_flops_spent": 2.0}
    assert "same probability" in language_report.examples([dearer], tmp_path, {})[1]
    _, _, best, _, worst = language_report.examples([dearer, row], tmp_path, {"e0": "zero | one"})
    order = [f"e{i}" for i in np.argsort(-probability)]
    assert [line.split(" | ")[1] for line in best.splitlines()[2:]] == order[:10]
    assert [line.split(" | ")[1] for line in worst.splitlines()[2:]] == order[:-11:-1]
    assert ("zero \\| one" in best + worst) == ("e0" in order[:10] + order[-10:])


@pytest.mark.parametrize("name", ["instruct-small", "gsm8k-pool"])
def test_data_sections_are_read(name):
    given = read_sections(CONFIGS / f"{name}.yaml")
    found = data_config(given["data"])
    assert {s.spoil for s in found.sources} == {None, "shuffle", "empty"}


def test_the_comparison_of_methods_is_read():
    grid = read_grid(CONFIGS / "compare-language.yaml")
    rankings = {"ppl", "less", "bm25", "embedding"}
    assert {e.method for e in grid.methods} == rankings | {"random", "full", "target-only", "joint", "search", "cads"}
    assert grid.count_selection


def stand_in(kind: str, path: Path, start: int) -> Path:
    """Rows with the columns of a published data set, and its empty answers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "messages":
        made = [{"dataset": path.stem, **row} for row in conversations(20)]
        for i, row in enumerate(made):
            row["id"] = f"{path.stem}-{i}"
            row["messages"][0]["content"] += f" {path.stem} {i}"
        return write_lines(path, made)
    texts = [(f"add {start + i}", "please" * (i % 2), f"sum {start + i + 1}.") for i in range(20)]
    if kind == "alpaca":
        texts.append((f"say nothing to {start}", "", ""))
    return write_lines(
        path, [{"instruction": a, "input": b, "output": c, "text": f"{a}{b}{c}", "subtask": "s"} for a, b, c in texts]
    )


PUBLISHED = {
    "gpt2-alpaca": ("alpaca", GPT2Config()),
    "llama-lora-fsdp": ("alpaca", None),
    "llama-2-7b-ccds": ("messages", LlamaConfig.from_json_file(str(CONFIGS / "models" / "llama-2-7b.json"))),
    "smollm2-gsm8k": ("pairs", None),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_settings_are_planned_at_their_size_and_run_on_a_stand_in(tmp_path, name):
    kind, real = PUBLISHED[name]
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    task = given["task"]
    for part in ("pool", "target", "test"):
        for i, source in enumerate(task[part]):
            start = 100 * i + 1000 * ("pool", "target", "test").index(part)
            for key in ("dataset", "split"):
                source.pop(key, None)
            shape = "pairs" if kind == "messages" and part != "pool" else kind
            source["path"] = str(stand_in(shape, tmp_path / part / f"{source['name']}.jsonl", start))
    sizes = {
        "max_tokens": 128,
        "tokenizer": None,
        "pad_token": None,
        "dtype": "float32",
        "n_target": None,
        "choices": None,
    }
    given["task"] = {
        **task,
        **sizes,
        "model": str(model_folder(tmp_path / "tiny", "gpt2" if "gpt2" in name else "llama")),
    }
    if real is not None:
        real.save_pretrained(tmp_path / "real")
        tokenizer().save_pretrained(tmp_path / "real")
        (tmp_path / "real.yaml").write_text(
            yaml.safe_dump({**given, "budget": "20 epochs", "task": {**given["task"], "model": str(tmp_path / "real")}})
        )
        words = ["--methods", "[search, random]", "--flops_per_second", "1e12", "--json", str(tmp_path / "plan.json")]
        assert cads(["plan", str(tmp_path / "real.yaml"), *words]) == 0
        assert "search" in (tmp_path / "plan.json").read_text()
    given["train"] |= {"batch_size": 4, "accumulate": min(2, given["train"].get("accumulate", 1)), "precision": "no"}
    given["budget"] = "8 epochs"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(given))
    quiet = ["--progress", "false", "--tensorboard", "false"]
    out = str(tmp_path / "out")
    options = ["--options.allowance", "0.5"] if given["method"] == "search" else []
    assert cads(["select", str(tmp_path / "tiny.yaml"), *options, "--out", out, *quiet]) == 0
    assert cads(["train", str(tmp_path / "tiny.yaml"), "--selection", out, "--budget", "1 epochs", *quiet]) == 0
    assert json.loads((tmp_path / "out" / "train" / "results.json").read_text())["metrics"]["loss"] > 0
    for folder in (tmp_path / "out", tmp_path / "out" / "train"):
        counted = json.loads((folder / "data.json").read_text())
        assert [s["source"] for s in counted["pool"]] == [s["name"] for s in task["pool"]]
        assert {s["left_out"] for part in ("pool", "target", "test set") for s in counted[part]} == {kind == "alpaca"}
