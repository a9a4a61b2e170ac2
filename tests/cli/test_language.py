"""Language from the command line: select and train."""

from __future__ import annotations

import json
import logging

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.cli.main import main
from cads.registry import build_selector
from cads.runtime.processes import SINGLE_PROCESS
from cads.selection import Selection
from cads.training.final import train
from tests.support.language_commands import LORA, built, run, turns
from tests.support.tiny_llama import sums, tokenizer, write_lines


def test_files_and_a_model_are_enough(folder, tmp_path, monkeypatch, capsys):
    """Without a configuration: two files are two sources, and the model that comes out is a folder of transformers."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (("one", sums(60)[:40]), ("two", sums(60)[40:]), ("val", sums(90)[60:])):
        write_lines(tmp_path / f"{name}.jsonl", rows)
    data = ("--pool", "one.jsonl", "--pool", "two.jsonl", "--target", "val.jsonl", "--model", folder / "llama")
    run("train", *data, "--budget", "3 epochs", "--train.batch_size", "8")
    assert "runs/one-two" in capsys.readouterr().out
    assert set(Selection.load(tmp_path / "runs" / "one-two").shares) == {"one", "two"}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {
        f.name for f in (tmp_path / "runs/one-two").iterdir()
    }


def test_select_and_train(folder, tmp_path):
    config, tokens = folder / "lora.yaml", 8000
    for name in ("one", "two"):
        # The guard cannot tell on a target of five examples.
        flags = ["--method", "search", "--budget", f"{tokens} tokens", "--options.guard", "false"]
        run("select", config, *flags, "--out", tmp_path / name)
    for file in ("selection.json", "scores.parquet"):
        assert (tmp_path / "one/selection" / file).read_bytes() == (tmp_path / "two/selection" / file).read_bytes()
    chosen = Selection.load(tmp_path / "one")
    task = built(folder, peft=LORA)
    budget = Budget(tokens, "tokens")
    assert 0 < chosen.ledger.total(SELECT).flops <= 3 * budget.flops(task)
    run("train", config, "--selection", tmp_path / "one", "--out", tmp_path / "trained")
    results = json.loads((tmp_path / "trained/results.json").read_text())
    assert {"loss", "token_loss", "perplexity"} <= set(results["metrics"])
    assert (tmp_path / "trained/adapter_model.safetensors").exists()
    assert not (tmp_path / "trained/model.safetensors").exists()
    check_panels(tmp_path / "one")


def check_panels(folder):
    """The most and the least probable examples are there to be read."""
    events = EventAccumulator(str(folder / "tensorboard/select"))
    events.Reload()
    shown = [t for t in events.Tags()["tensors"] if "probable" in t]
    assert {t.split("/")[1] for t in shown} == {"most_probable", "least_probable"}
    text = events.Tensors(shown[0])[0].tensor_proto.string_val[0].decode()
    assert "what is" in text
    assert "p = " in text


@pytest.mark.parametrize("first", [True, False])
def test_what_is_recognised_is_said_once_by_the_first_process(folder, selected, tmp_path, monkeypatch, capsys, first):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    monkeypatch.setattr(type(SINGLE_PROCESS), "first", first)
    monkeypatch.setattr("cads.cli.execution.close", lambda: None)
    rows = [*sums(40), {"id": "e", "prompt": "nothing", "response": "", "source": "right", "kind": "small"}]
    pool = write_lines(tmp_path / "pool.jsonl", rows)
    target = write_lines(tmp_path / "target.jsonl", [{"question": r["prompt"], "answer": "1."} for r in sums(20, 1)])
    given = [f"--task.pool=[{{path: {pool}}}]", f"--task.target=[{{name: t, path: {target}}}]", "--task.drop=true"]
    select = ["select", "--method", "random", "--options.fraction", "0.9", "--out", tmp_path / "s"]
    plan = ["plan", "--methods", "[random]", "--flops_per_second", "1e9"]
    train = ["train", "--selection", tmp_path / "s", "--out", tmp_path / "t"]
    for command, *flags in (plan, select, train) if first else (plan,):
        run(command, folder / "full.yaml", *given, *flags)
        said = "".join(capsys.readouterr().err.split())
        for text in (
            f"pool ({pool}): recognised as prompt, from columns prompt, response, id, source",
            f"t ({target}): recognised as prompt, from columns prompt = question, response = answer",
            "1 examples of pool have no answer token",
        ):
            assert said.count("".join(text.split())) == first


def test_what_was_cut_and_left_out_is_counted_beside_the_results(folder, selected, tmp_path):
    rows = [*sums(40), {"id": "e", "prompt": "nothing", "response": "", "source": "right", "kind": "small"}]
    pool = write_lines(tmp_path / "rows.jsonl", rows)
    given = [f"--task.pool=[{{path: {pool}}}]", "--task.drop=true", "--task.max_tokens=33", "--task.n_target=4"]
    given.append(f"--task.selector_model={folder / 'small'}")
    run("select", folder / "full.yaml", *given, "--method", "ppl", "--out", tmp_path / "s")
    run("train", folder / "full.yaml", *given, "--selection", tmp_path / "s")
    written = [json.loads((tmp_path / f"{name}data.json").read_text()) for name in ("s/", "s/train/")]
    assert written[0] == written[1]
    assert written[0]["max_tokens"] == 33
    found = [written[0]["selector"][part] for part in ("pool", "target", "test set")]
    assert sum(source["rows"] for (source,) in found) == 41
    left_out = sum(source["left_out"] for (source,) in found)
    cut = sum(source["cut"] + source["left_out_cut"] for (source,) in found)
    lengths = [len(tokenizer().apply_chat_template(turns(r), return_dict=True)["input_ids"]) for r in rows[:40]]
    assert cut == sum(n > 33 for n in lengths) > 0
    assert left_out >= 1


def test_the_same_seed_trains_the_same_weights(folder, selected, tmp_path):
    for name in ("one", "two"):
        run("train", folder / "lora.yaml", "--selection", selected, "--out", tmp_path / name)
    written = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "two")]
    assert written[0] == written[1]


def test_training_learns_and_stays_within_its_tokens(folder):
    task = built(folder)
    everything = build_selector("full").select(task, Budget(30, "epochs"), seed=0, ledger=Ledger())
    budget = Budget(8000, "tokens")
    outcome = train(task, everything, budget, seed=0)
    spent = outcome.ledger.total(TRAIN)
    assert spent.flops <= budget.flops(task)
    assert 0.8 * 8000 <= spent.tokens <= 1.2 * 8000
    assert outcome.train_result.losses[-3:].mean() < 0.8 * outcome.train_result.losses[:3].mean()


def test_merge_and_full_write_folders_that_transformers_loads(folder, selected, tmp_path):
    from transformers import AutoModelForCausalLM

    for config, flags in (("lora", ["--merge", "true"]), ("full", [])):
        out = tmp_path / config
        run("train", folder / f"{config}.yaml", "--selection", selected, "--out", out, *flags)
        loaded = AutoModelForCausalLM.from_pretrained(out)
        metrics = json.loads((out / "results.json").read_text())["metrics"]
        task = built(folder)
        assert task.metrics(loaded, task.test)["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
        assert not (out / "adapter_model.safetensors").exists()


def test_what_cannot_be_done_is_refused_before_training(folder, selected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cads.training.final.train", lambda *a, **k: pytest.fail("training began"))
    words = ["train", str(folder / "full.yaml"), "--selection", str(selected), "--out", str(tmp_path / "t")]
    assert main([*words, "--merge", "true"]) == 1
    assert "have no adapters to merge" in " ".join(capsys.readouterr().err.split())


class TestProxy:
    def test_a_selection_by_a_smaller_model_is_for_the_pool_of_the_larger(self, folder):
        task = built(folder, selector_model=str(folder / "small"))
        alone = built(folder)
        budget, ledgers = Budget(2, "epochs"), [Ledger(), Ledger()]
        chosen = [
            build_selector("ppl").select(t, budget, seed=0, ledger=x)
            for t, x in zip((task, alone), ledgers, strict=True)
        ]
        assert chosen[0].pool_hash == alone.pool.content_hash
        assert ledgers[0].total(SELECT).flops < 0.7 * ledgers[1].total(SELECT).flops
        assert train(alone, chosen[0], budget, seed=0).metrics["loss"] > 0
