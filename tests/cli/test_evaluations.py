"""Evaluations of language models by commands: what they measure, and that they are no part of a training."""

from __future__ import annotations

import errno
import json
import signal
from collections import Counter
from contextlib import contextmanager
from io import StringIO

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from rich.progress import TextColumn

from cads.accounting.ledger import Ledger
from cads.accounting.measured import count_flops
from cads.errors import ConfigError, DataError
from cads.monitor import Monitor
from cads.runtime.journal import Journal
from cads.runtime.signals import Interrupted, Interrupts
from cads.tasks.language.evaluation import extract
from cads.training.evaluations import evaluate
from tests.support.language_commands import built, run, spread
from tests.support.tiny_llama import sums, write_lines


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
