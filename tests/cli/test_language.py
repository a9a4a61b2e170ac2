"""Language from the command line: select, train, evaluate; and the same Selection in other libraries' trainers."""

from __future__ import annotations

import errno
import json
import logging
import os
import runpy
import signal
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from rich.progress import TextColumn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.accounting.measured import count_flops
from cads.cli.main import main
from cads.errors import ConfigError, DataError
from cads.monitor import Monitor
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.runtime.journal import Journal, _Underway
from cads.runtime.processes import SINGLE_PROCESS
from cads.runtime.signals import Interrupted, Interrupts
from cads.selection import Selection
from cads.tasks.language import evaluation, models
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.evaluation import extract
from cads.tasks.language.rows import TextSource
from cads.training.evaluations import evaluate
from cads.training.final import train
from tests.support.tiny_llama import model_folder, sums, tokenizer, write_lines

LORA = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
BUDGET = "2000 tokens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("commands")
    model_folder(made / "llama")
    model_folder(made / "small", hidden=8)
    write_lines(made / "sums.jsonl", sums(60))
    asked = [{"prompt": f"is {i}?", "choices": ["yes", "no", "so 3"], "answer": i % 3} for i in range(8)]
    write_lines(made / "choices.jsonl", asked)
    for name, peft in (("full", None), ("lora", LORA)):
        task = {"model": str(made / "llama"), "pool": [{"path": str(made / "sums.jsonl")}], "peft": peft}
        task |= {"choices": str(made / "choices.jsonl"), "max_new_tokens": 8, "n_test": 8}
        recipe = {"batch_size": 8, "learning_rate": 0.01}
        config = {"kind": "language", "task": task, "train": recipe, "budget": BUDGET}
        (made / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return made


def run(*words):
    assert main([*map(str, words), "--progress", "false"]) == 0


def built(folder, **options):
    pool = [TextSource(path=str(folder / "sums.jsonl"))]
    settings = {"model": str(folder / "llama"), "pool": pool, "n_test": 8, **options}
    return LanguageConfig(**settings).build(TrainConfig(batch_size=8, learning_rate=0.01))


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


@pytest.fixture(scope="module")
def selected(folder):
    """A Selection of a third of the pool, made by the command."""
    run("select", folder / "lora.yaml", "--method", "random", "--options.fraction", "0.3", "--out", folder / "random")
    return folder / "random"


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


def turns(row):
    """As a chat."""
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


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


class TestEvaluations:
    def test_by_command(self, folder, selected, tmp_path):
        out = tmp_path / "t"
        flags = ["--eval", "[choices, exact_match]"]
        run("train", folder / "lora.yaml", "--selection", selected, "--out", out, *flags)
        results = json.loads((out / "results.json").read_text())
        assert {"choices", "choices_per_character", "exact_match"} <= set(results["metrics"])
        charged = {(e["phase"], e["stage"]): e["flops"] for e in results["ledger"]}
        assert charged["evaluate", "choices"] > 0
        assert charged["evaluate", "exact_match"] > 0

    def test_choices_are_judged_by_likelihood(self, folder):
        """Against the log-likelihood of each answer by a plain call of the model."""
        task = built(folder, choices=str(folder / "choices.jsonl"))
        model = spread(task.model(0))
        right = 0
        for i in range(8):
            likelihood = []
            for answer in ("yes", "no", "so 3"):
                asked = task.tokenizer(f"<|user|>is {i}?<|end|>\n<|assistant|>")["input_ids"]
                ids = torch.tensor([asked + task.tokenizer(f"{answer}<|end|>")["input_ids"]])
                with torch.no_grad():
                    logp = model(ids).logits[0, :-1].log_softmax(dim=-1)
                likelihood.append(sum(float(logp[t - 1, ids[0, t]]) for t in range(len(asked), ids.shape[1])))
            right += int(np.argmax(likelihood)) == i % 3
        assert task.evaluate(model, "choices")["choices"] == right / 8

    def test_exact_match_writes_greedily(self, folder):
        """A model that was made to repeat one answer gets exactly the examples that have it."""
        task = built(folder, max_new_tokens=8)
        model = Repeating(task, "5.")
        wanted = [r["response"] for r in sums(60) if r["id"] in set(task.test.ids.to_pylist())]
        assert task.evaluate(model, "exact_match")["exact_match"] == wanted.count("5.") / len(wanted)
        model = Repeating(task, most := Counter(wanted).most_common(1)[0][0])
        assert task.evaluate(model, "exact_match")["exact_match"] == wanted.count(most) / len(wanted) > 0

    @pytest.mark.parametrize(
        ("text", "pattern", "found"),
        [
            (" 72. ", None, "72."),
            ("so 3 #### 72", r"#### (\d+)", "72"),
            ("#### 1 #### 2", r"#### (\d+)", "2"),
            ("a 7 b 8", r"\d", "8"),
            ("none", r"\d", None),
        ],
    )
    def test_what_is_compared(self, text, pattern, found):
        import re

        assert extract(text, None if pattern is None else re.compile(pattern)) == found

    @pytest.mark.parametrize(
        ("name", "options", "error", "message"),
        [
            ("poem", {}, ConfigError, "evaluation 'poem' is unknown: choose from choices, exact_match, lm_eval:TASKS"),
            ("lm_eval:", {}, ConfigError, "is unknown"),
            ("choices", {}, ConfigError, "needs task.choices"),
            ("choices", {"choices": "absent.jsonl"}, DataError, "cannot be read"),
            ("exact_match", {"answer_pattern": "("}, ConfigError, r"answer_pattern = '\(' is no regular expression"),
        ],
    )
    def test_refused(self, folder, name, options, error, message):
        with pytest.raises(error, match=message):
            built(folder, **options).check_evaluation(name)

    def test_choices_that_are_none(self, folder, tmp_path):
        for entry in (
            {"prompt": "q", "choices": ["a"], "answer": 0},
            {"prompt": "q", "choices": ["a", "b"], "answer": 2},
        ):
            file = write_lines(tmp_path / "c.jsonl", [entry])
            with pytest.raises(DataError, match="entry 0: it needs choices"):
                built(folder, choices=str(file)).check_evaluation("choices")

    def test_without_the_harness(self, folder, monkeypatch):
        monkeypatch.setattr("cads.tasks.language.evaluation.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"needs lm-evaluation-harness: pip install 'cads-select\[evaluation\]'"):
            built(folder).check_evaluation("lm_eval:arc_easy")

    def test_the_harness_on_a_local_task(self, folder, tmp_path):
        pytest.importorskip("lm_eval")
        rows = [{"q": f"is {i}?", "options": ["yes", "no"], "gold": i % 2} for i in range(6)]
        data = write_lines(tmp_path / "rows.jsonl", rows)
        settings = {
            "task": "local_choice",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        file = tmp_path / "local_choice.yaml"
        file.write_text(yaml.safe_dump(settings))
        task = built(folder)
        model = spread(task.model(0))
        found = {}
        flops = count_flops(lambda: found.update(task.evaluate(model, f"lm_eval:{file}")))
        assert flops > 0
        right = 0
        for row in rows:
            likelihood = []
            for option in row["options"]:
                asked = task.tokenizer(row["q"])["input_ids"]
                ids = torch.tensor([asked + task.tokenizer(f" {option}")["input_ids"]])
                with torch.no_grad():
                    logp = model(ids).logits[0, :-1].log_softmax(dim=-1)
                likelihood.append(sum(float(logp[t - 1, ids[0, t]]) for t in range(len(asked), ids.shape[1])))
            right += int(np.argmax(likelihood)) == row["gold"]
        assert found == {"local_choice/acc": right / 6}

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (OSError(errno.ENOSPC, "No space left on device", "cache.arrow"), "No space left"),
            (torch.OutOfMemoryError("out of memory"), "out of memory"),
            (ConnectionError("no network"), None),
            (FileNotFoundError(errno.ENOENT, "No such file", "rows.jsonl"), None),
        ],
        ids=lambda x: type(x).__name__,
    )
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_a_full_disk_under_the_harness_is_no_setting(self, folder, tmp_path, monkeypatch, error, said, wrapped):
        lm_eval = pytest.importorskip("lm_eval")

        def evaluate(**_):
            if wrapped and isinstance(error, OSError):
                # As `datasets` does.
                raise RuntimeError("an error occurred while generating the dataset") from error
            raise error

        monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
        file = tmp_path / "local_choice.yaml"
        file.write_text("task: local_choice\n")
        task = built(folder)
        with pytest.raises(ConfigError if said is None else type(error), match=said or "lm-evaluation-harness on"):
            task.evaluate(task.model(0), f"lm_eval:{file}")


def spread(model):
    """The model with weights that are not nearly zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


class Repeating(torch.nn.Module):
    """Stands in for a model that always writes the same answer."""

    def __init__(self, task, answer):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._answer = torch.tensor(task.tokenizer(f"{answer}<|end|>")["input_ids"])

    def generate(self, input_ids, **options):
        assert options["do_sample"] is False
        assert 6 in options["eos_token_id"]
        return torch.cat([input_ids, self._answer.expand(len(input_ids), -1)], dim=1)


class TestTrainedBeforeEvaluated:
    """An evaluation is done on the written model, and is no part of what a training is."""

    @pytest.fixture
    def words(self, folder, selected, tmp_path):
        return ["train", folder / "lora.yaml", "--selection", selected, "--out", tmp_path / "t"]

    @pytest.fixture
    def at_once(self, folder, selected, tmp_path):
        """The results of training and evaluation by one command."""
        out = tmp_path / "at once"
        flags = ["--eval", "[choices, exact_match]"]
        run("train", folder / "lora.yaml", "--selection", selected, "--out", out, *flags)
        return results_of(out)

    @pytest.mark.parametrize("merge", ["false", "true"])
    def test_other_evaluations_evaluate_the_finished_training(self, words, at_once, tmp_path, monkeypatch, merge):
        words = [*words, "--merge", merge]
        run(*words)
        written = {f.name: f.read_bytes() for f in (tmp_path / "t").glob("*.safetensors")}
        assert written
        assert "choices" not in results_of(tmp_path / "t")["metrics"]
        monkeypatch.setattr("cads.training.final.train", lambda *a, **k: pytest.fail("trained anew"))
        run(*words, "--eval", "choices")
        run(*words, "--eval", "[exact_match, choices]")
        results = results_of(tmp_path / "t")
        assert results["metrics"] == pytest.approx(at_once["metrics"])
        flops = [{(e["phase"], e["stage"]): e["flops"] for e in r["ledger"]} for r in (results, at_once)]
        if merge == "false":
            assert flops[0] == flops[1]
        assert flops[0].keys() == flops[1].keys()
        assert {f.name: f.read_bytes() for f in (tmp_path / "t").glob("*.safetensors")} == written
        assert not (tmp_path / "t/checkpoints").exists()

    def test_what_is_evaluated_is_not_evaluated_again(self, words, tmp_path, monkeypatch, capsys):
        run(*words, "--eval", "[choices, exact_match]")
        before = (tmp_path / "t/results.json").read_bytes()
        monkeypatch.setattr("cads.cli.commands.evaluate", lambda *a, **k: pytest.fail("evaluated again"))
        capsys.readouterr()
        for flags in ([], ["--eval", "choices"], ["--eval", "[exact_match, choices, choices]"]):
            run(*words, *flags)
            assert "nothing to do" in capsys.readouterr().out
        assert (tmp_path / "t/results.json").read_bytes() == before

    def test_other_settings_of_an_evaluation_evaluate_again(self, words, folder, tmp_path, monkeypatch):
        run(*words, "--eval", "[choices, exact_match]")
        first = results_of(tmp_path / "t")
        monkeypatch.setattr("cads.training.final.train", lambda *a, **k: pytest.fail("trained anew"))
        asked = [{"prompt": f"is {i}?", "choices": ["yes", "no"], "answer": 1} for i in range(3)]
        other = write_lines(tmp_path / "other.jsonl", asked)
        flags = ["--task.max_new_tokens", "1", "--task.choices", other, "--eval", "[choices, exact_match]"]
        run(*words, *flags)
        second = results_of(tmp_path / "t")
        assert second["evaluations"]["exact_match"]["settings"] == {"answer_pattern": None, "max_new_tokens": 1}
        assert second["evaluations"]["choices"] != first["evaluations"]["choices"]
        stages = Counter((e["phase"], e["stage"]) for e in second["ledger"])
        assert set(stages.values()) == {1}
        assert second["metrics"]["loss"] == first["metrics"]["loss"]

    def test_another_training_is_refused_as_before(self, words, capsys):
        run(*words)
        assert main([*map(str, words), "--train.learning_rate", "0.5", "--eval", "choices"]) == 1
        assert "settings.train.learning_rate was 0.01, now 0.5" in errors(capsys)
        assert main([*map(str, words), "--merge", "true", "--eval", "choices"]) == 1
        assert "settings.merge was false, now true" in errors(capsys)

    def test_an_unknown_evaluation_is_refused_before_training(self, words, monkeypatch, capsys):
        monkeypatch.setattr("cads.training.final.train", lambda *a, **k: pytest.fail("training began"))
        assert main([*map(str, words), "--eval", "[choices, poem]"]) == 1
        assert "evaluation 'poem' is unknown" in errors(capsys)

    @pytest.mark.parametrize("evaluated", [None, ["choices"]])
    def test_the_record_of_an_earlier_version_is_that_of_the_same_training(self, words, tmp_path, capsys, evaluated):
        run(*words)
        file = tmp_path / "t/train.json"
        record = json.loads(file.read_text())
        settings = record["identity"]["settings"]
        assert record.pop("form") == {"merge": False}
        settings |= {"eval": evaluated, "merge": False}
        settings["task"] |= {"choices": "elsewhere.jsonl", "max_new_tokens": 5}
        file.write_text(json.dumps(record))
        capsys.readouterr()
        run(*words)
        assert "nothing to do" in capsys.readouterr().out
        assert main([*map(str, words), "--merge", "true"]) == 1
        assert "settings.merge was false, now true" in errors(capsys)

    @pytest.mark.parametrize("name", ["choices", "exact_match"])
    def test_a_stop_comes_after_the_model_is_written_and_a_restart_goes_on(
        self, words, at_once, tmp_path, monkeypatch, capsys, name
    ):
        """SIGTERM in the third step: its forward pass is the last one, and the first two are not repeated."""
        monkeypatch.setattr("cads.training.evaluations.POLL_SECONDS", 0.0)
        monkeypatch.setattr(evaluation, "GENERATED_TOGETHER", 1)
        monkeypatch.setattr(evaluation, "scoring_batches", lambda pool: np.array_split(np.arange(len(pool)), 8))
        steps = Steps(monkeypatch, name)
        steps.stop_at = 2
        assert main([*map(str, words), "--progress", "false", "--eval", name]) == 128 + signal.SIGTERM
        assert "stopped by SIGTERM during evaluation; the same command goes on from here" in errors(capsys)
        assert steps.begun == [0, 1, 2]
        assert steps.forwards_after == 0
        assert (tmp_path / "t/adapter_model.safetensors").exists()
        assert name not in results_of(tmp_path / "t")["metrics"]
        steps.begun, steps.stop_at = [], None
        monkeypatch.setattr("cads.training.final.train", lambda *a, **k: pytest.fail("trained anew"))
        run(*words, "--eval", name)
        assert steps.begun == list(range(2, 8))
        results = results_of(tmp_path / "t")
        # Of the 8 steps of exact match, one example each, every other one is made a hit.
        assert results["metrics"][name] == (at_once["metrics"][name] if name == "choices" else 4 / 8)
        assert not (tmp_path / "t/checkpoints").exists()

    def test_checkpoints_go_on_with_other_evaluations(self, words, at_once, tmp_path, monkeypatch, capsys):
        """Those of an earlier version too, which has evaluations in the identity of a training."""
        step, left = _Underway.step, iter(range(3))

        def stopped(self, state):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGTERM)
            step(self, state)

        with monkeypatch.context() as earlier:
            earlier.setattr("cads.cli.commands.NEUTRAL", {})
            earlier.setattr("cads.cli.commands._evaluation_defaults", lambda config: {})
            earlier.setattr(_Underway, "step", stopped)
            flags = ["--eval", "choices", "--task.max_new_tokens", "5"]
            assert main([*map(str, words), *flags]) == 128 + signal.SIGTERM
        assert "stopped by SIGTERM during training" in errors(capsys)
        record = json.loads((tmp_path / "t/train.json").read_text())
        assert record["identity"]["settings"]["eval"] == "choices"
        run(*words, "--eval", "exact_match")
        metrics = results_of(tmp_path / "t")["metrics"]
        assert metrics == pytest.approx({k: v for k, v in at_once["metrics"].items() if not k.startswith("choices")})

    def test_a_merged_model_is_evaluated_as_after_a_restart(self, words, folder, selected, tmp_path):
        words = [*words, "--merge", "true"]
        run(*words, "--eval", "[choices, exact_match]")
        at_once = results_of(tmp_path / "t")
        run(*words[:-3], tmp_path / "later", "--merge", "true")
        run(*words[:-3], tmp_path / "later", "--merge", "true", "--eval", "[choices, exact_match]")
        later = results_of(tmp_path / "later")
        assert later["metrics"] == at_once["metrics"]
        flops = [[(e["phase"], e["stage"], e["flops"]) for e in r["ledger"]] for r in (later, at_once)]
        assert flops[0] == flops[1]

    def test_a_test_that_fails_keeps_the_written_model(self, words, at_once, tmp_path, monkeypatch):
        def fail(task, model, pool):
            raise RuntimeError("out of memory")

        with monkeypatch.context() as full:
            full.setattr("cads.tasks.language.task.LanguageTask.metrics", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                main([*map(str, words), "--progress", "false"])
        written = (tmp_path / "t/adapter_model.safetensors").read_bytes()
        assert not (tmp_path / "t/results.json").exists()
        run(*words, "--eval", "[choices, exact_match]")
        assert (tmp_path / "t/adapter_model.safetensors").read_bytes() == written
        assert results_of(tmp_path / "t")["metrics"] == at_once["metrics"]

    def test_a_merge_that_fails_keeps_the_training(self, words, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(models, "MERGE_TOLERANCE", {"float32": -1.0})
        assert main([*map(str, words), "--progress", "false", "--merge", "true"]) == 1
        assert "give merge = false, which writes the adapter of this training" in errors(capsys)
        assert not list((tmp_path / "t").glob("*.safetensors"))
        assert not (tmp_path / "t/results.json").exists()
        monkeypatch.setattr("cads.training.trainer.Trainer._train", lambda *a: pytest.fail("trained anew"))
        run(*words)
        assert (tmp_path / "t/adapter_model.safetensors").exists()


def errors(capsys):
    """What was written to stderr, with single spaces."""
    return " ".join(capsys.readouterr().err.split())


def results_of(folder):
    """The contents of `results.json`."""
    return json.loads((folder / "results.json").read_text())


class Steps:
    """The steps of an evaluation as they begin; SIGTERM comes as step `stop_at` begins."""

    def __init__(self, monkeypatch, name):
        self.begun, self.stop_at, self.forwards_after = [], None, 0
        plain = getattr(evaluation, name)

        def watched(task, model):
            stepwise = plain(task, model)
            head = model.get_output_embeddings()

            def step(number):
                self.begun.append(number)
                if number == self.stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                    head.register_forward_hook(self.count)
                values = stepwise.step(number)
                return values if name == "choices" else np.full_like(values, number % 2)

            return type(stepwise)(stepwise.sizes, step, stepwise.metrics)

        monkeypatch.setattr(evaluation, name, watched)

    def count(self, *_):
        self.forwards_after += 1


class Bar(Monitor):
    """Keeps what a progress bar would show of examples."""

    def __init__(self):
        super().__init__()
        self.shown = []

    @contextmanager
    def counting(self, stage, total):
        yield lambda done: self.shown.append((stage, done, total))


def test_an_evaluation_says_how_far_it_is(folder):
    task = built(folder, choices=str(folder / "choices.jsonl"), max_new_tokens=2)
    bar, model = Bar(), spread(task.model(0))
    for name, total in (("choices", 24), ("exact_match", 8)):
        bar.shown = []
        evaluate(task, model, name, ledger=Ledger(), monitor=bar)
        assert {(stage, n) for stage, _, n in bar.shown} == {(name, total)}
        done = [n for _, n, _ in bar.shown]
        assert done[0] == 0
        assert done == sorted(done)
        assert done[-1] == total


def test_the_bar_counts_examples_and_flops():
    with Monitor(console=Console(file=StringIO(), width=120, force_terminal=True)) as monitor:
        bar = monitor._shown.bar

        def text():
            (shown,) = bar.tasks
            rendered = (column.render(shown).plain for column in bar.columns if type(column) is TextColumn)
            return " ".join(" ".join(rendered).split())

        with monitor.counting("exact_match", 1319) as advance:
            advance(256)
            assert text() == "exact_match 256/1,319 examples"
        with monitor.counting("test", None):
            assert bar.tasks[0].total is None
            assert text() == "test"
        with monitor.progress("theta", 2e12) as advance:
            advance(1e12, 0.5, 0.1)
            assert text() == "target model 1e+12/2e+12 FLOPs loss 0.500"


def test_an_evaluation_in_one_piece_stops_within_a_forward_pass(folder, tmp_path, monkeypatch):
    """As that of lm-evaluation-harness, or of a task that defines `evaluate` alone."""
    monkeypatch.setattr("cads.training.evaluations.POLL_SECONDS", 0.0)
    task, passes = built(folder), []
    model = spread(task.model(0))

    def evaluated(model, name):
        for i in range(10):
            if i == 3:
                interrupts.pending = int(signal.SIGTERM)
            task.metrics(model, task.test.subset(np.arange(2), "two"))
            passes.append(i)
        return {"poem": 1.0}

    monkeypatch.setattr(task, "stepwise_evaluation", lambda *_: None)
    monkeypatch.setattr(task, "evaluate", evaluated)
    interrupts = Interrupts()
    with Journal(tmp_path, {}, interrupts=interrupts).open(), pytest.raises(Interrupted, match="during evaluation"):
        evaluate(task, model, "poem", ledger=Ledger(), monitor=Monitor())
    assert passes == [0, 1, 2]


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
