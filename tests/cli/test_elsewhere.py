"""A Selection of texts in other libraries: data sets, samplers, mixtures and trainers."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import yaml

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.selection import Selection
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from tests.support.language_commands import BUDGET, built, run, turns
from tests.support.tiny_llama import sums, tokenizer, write_lines


class TestElsewhere:
    def test_a_selection_applies_to_a_dataset(self, folder, selected):
        from datasets import Dataset

        chosen = Selection.load(selected)
        rows = chosen.apply(Dataset.from_json(str(folder / "sums.jsonl")))
        wanted = {i for i, kept in zip(chosen.ids.to_pylist(), chosen.selected, strict=True) if kept}
        assert set(rows["id"]) == wanted
        assert 0 < len(rows) < len(chosen.ids)

    def test_its_mixture_interleaves_sources(self, folder, selected):
        from datasets import Dataset, interleave_datasets

        weights = Selection.load(selected).mixture()
        parts = [Dataset.from_list([r for r in sums(60) if r["source"] == name]) for name in weights]
        mixed = interleave_datasets(
            [p.repeat(60) for p in parts],
            probabilities=list(weights.values()),
            seed=0,
            stopping_strategy="first_exhausted",
        )
        drawn = Counter(mixed["source"])
        for name, weight in weights.items():
            assert drawn[name] / len(mixed) == pytest.approx(weight, abs=0.05)

    def test_its_sampler_goes_through_the_pool(self, folder, selected):
        task, chosen = built(folder), Selection.load(selected)
        seen = list(chosen.sampler(task.pool))
        assert sorted(seen) == chosen.positions(task.pool).tolist()

    @pytest.mark.parametrize("name", ["transformers_trainer", "trl_sft"])
    def test_the_examples_run(self, folder, selected, tmp_path, monkeypatch, name):
        if name == "trl_sft":
            pytest.importorskip("trl")
        model = built(folder).model(0)
        model.save_pretrained(tmp_path / "m")
        tokenizer().save_pretrained(tmp_path / "m")
        words = [tmp_path / "m", folder / "sums.jsonl", selected, tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        runpy.run_module(f"experiments.examples.{name}", run_name="__main__")
        assert list((tmp_path / "out").glob("checkpoint-10/model.safetensors"))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_selection_of_files_without_ids_applies_to_each_of_them_and_to_all(
        self, folder, tmp_path, monkeypatch, streaming
    ):
        """The rows that apply gives have the tokens of the pool's selected examples."""
        from datasets import load_dataset

        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        files = {name: unnamed(tmp_path / f"{name}.jsonl", sums(60, seed)) for name, seed in (("a", 1), ("b", 2))}
        pool = [TextSource(path=str(file)) for file in files.values()]
        task = LanguageConfig(model=str(folder / "llama"), pool=pool, n_test=8).build(TrainConfig(batch_size=8))
        random = build_selector("random", {"fraction": 0.5})
        chosen = random.select(task, Budget(2, "epochs"), seed=0, ledger=Ledger())
        chosen = Selection.load(chosen.save(tmp_path / "s"))
        wanted = texts_of(task, chosen)
        found = {}
        for names in (["a"], ["b"], ["b", "a"]):
            data = [str(files[name]) for name in names]
            dataset = load_dataset("json", data_files=data, split="train", streaming=streaming)
            found["".join(names)] = Counter(row["prompt"] for row in chosen.apply(dataset))
        assert found["ba"] == wanted
        assert found["a"] + found["b"] == wanted
        assert 0 < found["a"].total() < wanted.total()

    @pytest.mark.parametrize("pad", ["<pad>", "</s>"])
    @pytest.mark.parametrize("layout", ["pairs", "messages"])
    @pytest.mark.parametrize("name", ["transformers_trainer", "trl_sft"])
    def test_the_examples_train_on_the_tokens_and_labels_of_cads(
        self, folder, tmp_path, monkeypatch, name, layout, pad
    ):
        """Without a column of ids; also where the padding token ends answers. The selection draws by weight."""
        if name == "trl_sft":
            pytest.importorskip("trl")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        rows = [{**row, "prompt": f"{i} " + row["prompt"]} for i, row in enumerate(sums(60, 5))]
        if layout == "messages":
            rows = [{"id": row["id"], "messages": turns(row), "source": row["source"]} for row in rows]
        file = unnamed(tmp_path / "rows.jsonl", rows)
        settings = {"model": str(tmp_path / "m"), "pool": [{"path": str(file)}], "n_test": 8, "pad_token": pad}
        settings |= {"chat": False, "separator": "\n\n"} if layout == "pairs" else {}
        config = {"kind": "language", "task": settings, "train": {"batch_size": 8}, "budget": BUDGET}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        built(folder).model(0).save_pretrained(tmp_path / "m")
        tokenizer(pad=None).save_pretrained(tmp_path / "m")
        run("select", tmp_path / "c.yaml", "--method", "random", "--options.fraction", "0.5", "--out", tmp_path / "s")
        draws_by_weight(tmp_path / "s/selection")
        task = LanguageConfig(**{**settings, "pool": [TextSource(path=str(file))]}).build(TrainConfig(batch_size=8))
        expected = learned_by_cads(task, Selection.load(tmp_path / "s"))
        batches = []
        monkeypatch.setattr(
            "transformers.Trainer.train", lambda trainer: batches.extend(trainer.get_train_dataloader())
        )
        words = [tmp_path / "m", file, tmp_path / "s", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_module(f"experiments.examples.{name}", run_name="__main__")
        seen = Counter(pair for batch in batches for pair in learned(batch))
        assert seen == expected
        if layout == "pairs":
            end = task.tokenizer.eos_token_id
            assert all(labels[-1] == end for _, labels in seen)


def unnamed(file, rows):
    """Rows without ids."""
    return write_lines(file, [{name: value for name, value in row.items() if name != "id"} for row in rows])


def texts_of(task, selection):
    """How often each prompt is among the selected examples of the pool."""
    return Counter(task.texts(task.pool)[position] for position in selection.positions(task.pool))


def draws_by_weight(folder):
    """Give the selected examples of a saved Selection weights in proportion to 1, 2, 3, ..."""
    selection = Selection.load(folder)
    n = len(selection.ids)
    replace(
        selection, probability=np.arange(1, n + 1) / n, selected=np.ones(n, dtype=bool), weighted=True, trained=None
    ).save(folder)


def learned_by_cads(task, selection):
    """Tokens and labels of the pool's examples, each as often as `weights="resample"` draws it."""
    counts = selection._draw_counts(0)
    positions = np.repeat(selection.positions(task.pool), counts[selection.selected])
    batch = task.pool.batch(positions)
    return Counter(learned({**batch.inputs, "labels": batch.labels}))


def learned(batch):
    """The tokens and the labels of each example of a batch, without padding."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    for ids, labels, length in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), lengths, strict=True):
        assert set(labels[length:]) <= {-100}
        yield tuple(ids[:length]), tuple(labels[:length])
