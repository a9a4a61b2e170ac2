"""Exports for trainers: what their own parsers read, in the shares in which training draws; no loss is silent."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import yaml

import cads
from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.cli.main import main
from cads.errors import ConfigError, DataError, SelectionError
from cads.recipe import TrainConfig
from cads.selection import Selection
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from tests.support.tiny_llama import conversations, model_folder, sums, write_lines

TRAINERS = ("llamafactory", "axolotl", "trl")
SIZES = {"a": 40, "b/x, y": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model") / "llama")


def pool(model, folder, rows, **options):
    """A pool of two files, whose rows are those given by the name of their source."""
    folder.mkdir(exist_ok=True)
    files = [write_lines(folder / f"{i}.jsonl", part) for i, part in enumerate(rows.values())]
    sources = [TextSource(name=name, path=str(file), **options) for name, file in zip(rows, files, strict=True)]
    config = LanguageConfig(model=str(model), pool=sources, n_target=4, n_test=4)
    return config.build(TrainConfig(batch_size=8)).pool


def pairs(**extra):
    rows = sums(60)
    return {"a": [{**row, **extra} for row in rows[:40]], "b/x, y": [{**row, **extra} for row in rows[40:]]}


def chosen(examples, *, by_source=None, by_example=False):
    """Half of a pool; sources drawn as `by_source` says, and of each source every second row four times as often."""
    n = len(examples)
    selected = np.arange(n) % 2 == 0
    probability = np.ones(n)
    if by_source is not None:
        counts = np.bincount(examples.sources, weights=selected)
        amounts = np.array([by_source[name] for name in examples.source_names]) / counts
        probability = (amounts / amounts.max())[examples.sources]
    if by_example:
        probability = probability * np.where(np.arange(n) % 4 == 0, 1.0, 0.25)
    weighted = by_source is not None or by_example
    return Selection.from_pool(
        examples, selected=selected, method="halves", seed=0, budget=Budget(1, "epochs"), ledger=Ledger(),
        probability=probability if weighted else None, weighted=weighted,
    )  # fmt: skip


def written(folder):
    """The rows of each file, by its name."""
    return {file.stem: [json.loads(line) for line in file.open()] for file in sorted((folder / "data").iterdir())}


def texts(row):
    """The contents of a row in any form, without roles."""
    messages = row.get("messages") or [*row["prompt"], *row["completion"]]
    return tuple(message["content"] for message in messages)


@pytest.mark.parametrize("to", TRAINERS)
def test_rows_are_those_chosen_each_in_the_file_of_its_source(model, tmp_path, to):
    examples = pool(model, tmp_path / "data", pairs())
    selection = chosen(examples)
    count = cads.export(selection, tmp_path / "out", to=to)
    files = written(tmp_path / "out")
    assert set(files) == {"a", "b_x_y"}
    rows = {row["id"]: row for part in pairs().values() for row in part}
    expected = {}
    for i in np.flatnonzero(selection.selected):
        row = rows[examples.ids[int(i)].as_py()]
        expected.setdefault(("a", "b_x_y")[examples.sources[i]], []).append((row["prompt"], row["response"]))
    assert {name: sorted(map(texts, part)) for name, part in files.items()} == {
        k: sorted(v) for k, v in expected.items()
    }
    assert count == int(selection.selected.sum())
    assert [texts(row) for row in files["a"]] != sorted(texts(row) for row in files["a"]), "in a random order"
    for name, part in files.items():
        assert {row["source"] for row in part} == {{"a": "a", "b_x_y": "b/x, y"}[name]}
        assert all(row["weight"] == pytest.approx(1 / count) for row in part)
    cads.export(selection, tmp_path / "again", to=to)
    assert written(tmp_path / "again") == files


def trl_rows(folder, monkeypatch, tmp_path):
    """The data set that TRL's own script makes of its configuration."""
    trl = pytest.importorskip("trl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    parser = trl.TrlParser((trl.ScriptArguments, trl.DatasetMixtureConfig))
    assert "*id" not in (folder / "trl.yaml").read_text()
    settings = yaml.safe_load((folder / "trl.yaml").read_text())
    file = tmp_path / "read.yaml"
    file.write_text(yaml.safe_dump({"datasets": settings["datasets"]}))
    _, mixture = parser.parse_args_and_config(["--config", str(file)])
    return trl.get_dataset(mixture)["train"]


def test_trl_reads_the_shares(model, tmp_path, monkeypatch):
    selection = chosen(pool(model, tmp_path / "data", pairs()), by_source={"a": 0.25, "b/x, y": 0.75})
    cads.export(selection, tmp_path / "out", to="trl")
    rows = trl_rows(tmp_path / "out", monkeypatch, tmp_path)
    assert set(rows.column_names) == {"prompt", "completion"}
    known = {texts(row): name for name, part in written(tmp_path / "out").items() for row in part}
    counts = Counter(known[texts(row)] for row in rows)
    assert counts["a"] / len(rows) == pytest.approx(0.25, abs=0.05)
    assert rows[0]["prompt"][-1]["role"] == "user"
    assert [message["role"] for message in rows[0]["completion"]] == ["assistant"]


@pytest.mark.parametrize("chat", [True, False])
def test_trl_trains_on_what_is_written(model, tmp_path, monkeypatch, chat):
    trl = pytest.importorskip("trl")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    selection = chosen(pool(model, tmp_path / "data", pairs()))
    cads.export(selection, tmp_path / "out", to="trl", chat=chat)
    rows = trl_rows(tmp_path / "out", monkeypatch, tmp_path)
    settings = yaml.safe_load((tmp_path / "out" / "trl.yaml").read_text())
    settings.pop("datasets")
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trained"), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        bf16=False, **settings,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    trainer = trl.SFTTrainer(
        network, arguments, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(model)
    )
    example = trainer.train_dataset[0]
    tokens = AutoTokenizer.from_pretrained(model)
    learned = [i for i in example["labels"] if i >= 0]
    said = rows[0]["completion"][0]["content"] if chat else rows[0]["completion"]
    assert tokens.decode(learned, skip_special_tokens=True).strip() == said
    trainer.train()


def test_llama_factory_reads_the_shares(model, tmp_path):
    selection = chosen(pool(model, tmp_path / "data", pairs()), by_source={"a": 0.25, "b/x, y": 0.75})
    cads.export(selection, tmp_path / "out", to="llamafactory")
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    settings = yaml.safe_load((tmp_path / "out" / "llamafactory.yaml").read_text())
    assert settings["dataset"].split(",") == list(info) == ["a", "b_x_y"]
    assert settings["mix_strategy"] == "interleave_under"
    probabilities = [float(p) for p in settings["interleave_probs"].split(",")]
    assert probabilities == pytest.approx([0.25, 0.75])
    assert sum(probabilities) == pytest.approx(1, abs=1e-12)
    assert settings["stage"] == "sft"
    for entry in info.values():
        row = json.loads((tmp_path / "out" / entry["file_name"]).read_text().splitlines()[0])
        messages = row[entry["columns"]["messages"]]
        tags = entry["tags"]
        roles = [message[tags["role_tag"]] for message in messages]
        assert roles == [tags["user_tag"], tags["assistant_tag"]]
        assert all(message[tags["content_tag"]] for message in messages)


def test_llama_factory_itself_reads_it(model, tmp_path):
    parser = pytest.importorskip("llamafactory.data.parser", exc_type=ImportError)
    arguments = pytest.importorskip("llamafactory.hparams.data_args", exc_type=ImportError)
    utilities = pytest.importorskip("llamafactory.data.data_utils", exc_type=ImportError)
    converter = pytest.importorskip("llamafactory.data.converter", exc_type=ImportError)
    import datasets

    selection = chosen(pool(model, tmp_path / "data", pairs()), by_source={"a": 0.25, "b/x, y": 0.75})
    cads.export(selection, tmp_path / "out", to="llamafactory")
    settings = yaml.safe_load((tmp_path / "out" / "llamafactory.yaml").read_text())
    settings.pop("stage")
    data_args = arguments.DataArguments(template="default", **settings)
    parts = []
    for described in parser.get_dataset_list(data_args.dataset, data_args.dataset_dir):
        file = tmp_path / "out" / described.dataset_name
        part = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
        turns = converter.get_dataset_converter(described.formatting, described, data_args)(part[0])
        assert [turn["content"] for turn in (*turns["_prompt"], *turns["_response"])] == list(texts(part[0]))
        parts.append(part)
    merged = utilities.merge_dataset(parts, data_args, seed=0)
    assert np.mean([source == "a" for source in merged["source"]]) == pytest.approx(0.25, abs=0.2)


def test_axolotl_gets_the_shares_as_numbers_of_rows(model, tmp_path, monkeypatch):
    selection = chosen(pool(model, tmp_path / "data", pairs()), by_source={"a": 0.25, "b/x, y": 0.75})
    monkeypatch.chdir(tmp_path)
    cads.export(selection, "out", to="axolotl")
    sizes = {name: len(rows) for name, rows in written(tmp_path / "out").items()}
    assert sum(sizes.values()) == selection.selected.sum()
    assert sizes["a"] / sum(sizes.values()) == pytest.approx(0.25, abs=0.2)
    settings = yaml.safe_load((tmp_path / "out" / "axolotl.yaml").read_text())
    assert [entry["path"] for entry in settings["datasets"]] == ["out/data/a.jsonl", "out/data/b_x_y.jsonl"]
    for entry in settings["datasets"]:
        assert (tmp_path / entry["path"]).exists()
        assert (entry["type"], entry["field_messages"], entry["ds_type"]) == ("chat_template", "messages", "json")
    schemas = pytest.importorskip("axolotl.utils.schemas.datasets", exc_type=ImportError)
    for entry in settings["datasets"]:
        read = schemas.SFTDataset(**entry)
        assert {name: getattr(read, name) for name in entry} == entry
    with pytest.raises(ConfigError, match=r"axolotl takes no shares.*--weights resample"):
        cads.export(selection, "again", to="axolotl", weights="column")


@pytest.mark.parametrize("to", TRAINERS)
def test_weights_within_a_source_repeat_rows(model, tmp_path, to, caplog):
    selection = chosen(pool(model, tmp_path / "data", pairs()), by_source={"a": 0.5, "b/x, y": 0.5}, by_example=True)
    cads.export(selection, tmp_path / "out", to=to)
    rows = [row for part in written(tmp_path / "out").values() for row in part]
    assert len(rows) == selection.selected.sum()
    assert len(set(map(texts, rows))) < len(rows)
    assert not any("weight" in row for row in rows)
    assert "different weights" not in caplog.text
    if to != "axolotl":
        cads.export(selection, tmp_path / "once", to=to, weights="column")
        once = [row for part in written(tmp_path / "once").values() for row in part]
        assert len(set(map(texts, once))) == len(once)
        assert sum(row["weight"] for row in once) == pytest.approx(1)
        assert f"different weights, which {to} does not read" in caplog.text


def talks(n=24):
    rows = conversations(n)
    return {"a": rows[: n // 2], "b/x, y": rows[n // 2 :]}


def test_conversations_keep_their_turns_and_what_is_learned(model, tmp_path, caplog):
    selection = chosen(pool(model, tmp_path / "data", talks()))
    for to in TRAINERS:
        cads.export(selection, tmp_path / to, to=to)
        row = written(tmp_path / to)["a"][0]
        assert [m["role"] for m in row["messages"] if m["role"] != "system"] == ["user", "assistant"] * 2
    assert yaml.safe_load((tmp_path / "trl" / "trl.yaml").read_text())["assistant_only_loss"] is True
    assert "mask_history" not in (tmp_path / "llamafactory" / "llamafactory.yaml").read_text()
    assert "message_field_training" not in (tmp_path / "axolotl" / "axolotl.yaml").read_text()
    assert "cads learned others" not in caplog.text


def test_answers_that_are_not_learned_are_marked_or_named(model, tmp_path, caplog):
    rows = talks()
    first = next(i for i, m in enumerate(rows["a"][0]["messages"]) if m["role"] == "assistant")
    for part in rows.values():
        for row in part[::3]:
            row["messages"] = [{**m, "weight": int(i != first)} for i, m in enumerate(row["messages"])]
    selection = chosen(pool(model, tmp_path / "data", rows))
    cads.export(selection, tmp_path / "axolotl", to="axolotl")
    assert "cads learned others" not in caplog.text
    marked = [row["messages"] for part in written(tmp_path / "axolotl").values() for row in part]
    assert "message_field_training: train" in (tmp_path / "axolotl" / "axolotl.yaml").read_text()
    assert all(isinstance(m["train"], bool) for messages in marked for m in messages)
    assert any(m["role"] == "assistant" and not m["train"] for messages in marked for m in messages)
    for to in ("trl", "llamafactory"):
        caplog.clear()
        cads.export(selection, tmp_path / to, to=to)
        assert f"{to} learns every answer, and cads learned others" in caplog.text


def test_earlier_turns_are_not_learned(model, tmp_path):
    selection = chosen(pool(model, tmp_path / "data", pairs(history=[["hello", "hi."]], system="be brief.")))
    for to in TRAINERS:
        cads.export(selection, tmp_path / to, to=to)
    assert yaml.safe_load((tmp_path / "llamafactory" / "llamafactory.yaml").read_text())["mask_history"] is True
    (row, *_) = written(tmp_path / "trl")["a"]
    assert [m["content"] for m in row["prompt"]][:3] == ["be brief.", "hello", "hi."]
    (row, *_) = written(tmp_path / "axolotl")["a"]
    assert [m["train"] for m in row["messages"]] == [False, False, False, False, True]


def test_tools_go_along(model, tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    selection = chosen(pool(model, tmp_path / "data", pairs(tools=tools)))
    for to in TRAINERS:
        cads.export(selection, tmp_path / to, to=to)
    assert written(tmp_path / "trl")["a"][0]["tools"] == tools
    assert "tools" in yaml.safe_load((tmp_path / "trl" / "trl.yaml").read_text())["datasets"][0]["columns"]
    assert json.loads(written(tmp_path / "llamafactory")["a"][0]["tools"]) == tools
    info = json.loads((tmp_path / "llamafactory" / "dataset_info.json").read_text())
    assert info["a"]["columns"]["tools"] == "tools"


def test_text_is_for_pretraining(model, tmp_path):
    rows = {name: [{"text": f"{row['prompt']} {row['response']}"} for row in part] for name, part in pairs().items()}
    selection = chosen(pool(model, tmp_path / "data", rows))
    for to in TRAINERS:
        cads.export(selection, tmp_path / to, to=to)
        assert {row["text"] for row in written(tmp_path / to)["a"]} <= {row["text"] for row in rows["a"]}
    assert "stage: pt" in (tmp_path / "llamafactory" / "llamafactory.yaml").read_text()
    assert "type: completion" in (tmp_path / "axolotl" / "axolotl.yaml").read_text()


def test_columns_mean_what_they_meant_in_training(model, tmp_path):
    """Templates and columns that were named are those of the export too."""
    columns = {"prompt": "{kind}: {prompt}", "response": "response"}
    selection = chosen(pool(model, tmp_path / "data", pairs(), columns=columns))
    selection.save(tmp_path / "selection")
    cads.export(tmp_path / "selection", tmp_path / "out", to="trl")
    assert all(texts(row)[0].startswith(("small: what", "large: what")) for row in written(tmp_path / "out")["a"])


def test_an_earlier_selection_is_read_by_the_names_of_columns(model, tmp_path, caplog):
    examples = pool(model, tmp_path / "data", pairs())
    selection = chosen(examples)
    files = tuple(replace(file, roles=None) for file in selection.origin.files)
    selection = replace(selection, origin=replace(selection.origin, files=files))
    cads.export(selection, tmp_path / "out", to="trl")
    assert "taken for prompt by the names of its columns, prompt = prompt, response = response" in caplog.text
    assert len(written(tmp_path / "out")["a"]) > 0
    files = tuple(replace(file, columns=("prompt",)) for file in files)
    with pytest.raises(SelectionError, match=r"their names do not tell|changed since"):
        cads.export(replace(selection, origin=replace(selection.origin, files=files)), tmp_path / "no", to="trl")


def test_without_a_chat_template(model, tmp_path):
    selection = chosen(pool(model, tmp_path / "data", pairs()))
    cads.export(selection, tmp_path / "axolotl", to="axolotl", chat=False)
    row = written(tmp_path / "axolotl")["a"][0]
    assert row["prompt"].endswith("?\n")
    entry = yaml.safe_load((tmp_path / "axolotl" / "axolotl.yaml").read_text())["datasets"][0]
    assert entry["type"]["field_output"] == "completion"
    with pytest.raises(ConfigError, match="`template` of its own configuration"):
        cads.export(selection, tmp_path / "llamafactory", to="llamafactory", chat=False)
    with pytest.raises(DataError, match="which only a chat template writes"):
        cads.export(chosen(pool(model, tmp_path / "talks", talks())), tmp_path / "no", to="trl", chat=False)
    assert not (tmp_path / "no").exists()
    with pytest.raises(ConfigError, match="chat = false is for"):
        cads.export(selection, tmp_path / "rows.jsonl", chat=False)


def test_texts_beside_chats_are_refused(model, tmp_path):
    rows = {"a": sums(20), "b": [{"text": f"line {i} of it"} for i in range(20)]}
    with pytest.raises(DataError, match="plain text and some are chats"):
        cads.export(chosen(pool(model, tmp_path / "data", rows)), tmp_path / "out", to="trl")
    files = [tmp_path / "data" / "0.jsonl"]
    assert cads.export(chosen(pool(model, tmp_path / "data", rows)), tmp_path / "out", to="trl", files=files) > 0


def test_folders_are_not_replaced_unasked(model, tmp_path):
    selection = chosen(pool(model, tmp_path / "data", pairs()))
    out = tmp_path / "out"
    cads.export(selection, out, to="trl")
    with pytest.raises(ConfigError, match="exists: name another"):
        cads.export(selection, out, to="trl")
    cads.export(selection, out, to="llamafactory", overwrite=True)
    assert not (out / "trl.yaml").exists()
    (out / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds \['mine.txt'\]"):
        cads.export(selection, out, to="trl", overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        cads.export(selection, out / "mine.txt", to="trl")
    with pytest.raises(ConfigError, match=r"holds \['0.jsonl', '1.jsonl'\]"):
        cads.export(selection, tmp_path / "data", to="trl", overwrite=True)
    with pytest.raises(ConfigError, match="rows of trainers have this field"):
        cads.export(selection, tmp_path / "no", to="trl", source_column="messages")


def test_a_pool_without_sources_is_one_file(model, tmp_path):
    rows = {"only": [{k: v for k, v in row.items() if k != "source"} for row in sums(40)]}
    selection = chosen(pool(model, tmp_path / "data", rows))
    cads.export(selection, tmp_path / "out", to="llamafactory")
    assert len(written(tmp_path / "out")) == 1
    assert "mix_strategy: concat" in (tmp_path / "out" / "llamafactory.yaml").read_text()


def test_the_command_writes_it(model, tmp_path, capsys):
    chosen(pool(model, tmp_path / "data", pairs())).save(tmp_path / "selection")
    words = ["export", str(tmp_path / "selection"), "--to", "trl", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    rows = sum(len(part) for part in written(tmp_path / "out").values())
    assert capsys.readouterr().out.replace("\n", "") == f"{rows} rows: {tmp_path / 'out'}"
    assert main([*words, "--to", "axolotl", "--overwrite", "true", "--chat", "false"]) == 0
    assert (tmp_path / "out" / "axolotl.yaml").exists()
