"""An evaluation is done on the written model, and is no part of what a training is."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter

import numpy as np
import pytest

from cads.cli.main import main
from cads.runtime.journal import _Underway
from cads.tasks.language import evaluation, models
from tests.support.language_commands import errors, results_of, run
from tests.support.tiny_llama import write_lines


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
