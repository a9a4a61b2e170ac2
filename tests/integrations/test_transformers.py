"""The method `cads` in other trainers equals `cads train` to the last bit, is resumed, and keeps to its budget."""

from __future__ import annotations

import base64
import copy
import json
import re
import runpy
import shutil
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import GPT2Config, Trainer, TrainingArguments

import cads
from cads.accounting.ledger import EVALUATE, SELECT, TRAIN
from cads.cli.main import main
from cads.errors import BudgetError, CheckpointError, ConfigError, DataError, NonFiniteError
from cads.integrations.transformers import OnlineSelection, tokenised_task
from cads.recipe import TrainConfig
from cads.selection import Selection
from cads.selectors.online.schedule import PRETRAINED
from tests.support.forked_processes import spread
from tests.support.language_tasks import LORA
from tests.support.other_trainers import (
    QUIET,
    SEED,
    assert_same_weights,
    digits_task,
    online,
    sft,
    sums_task,
    write_sums,
)
from tests.support.paths import ROOT
from tests.support.tiny_llama import CONTEXT, VOCABULARY, tokenizer, write_lines

EPOCHS = "3 epochs"
DIGIT_EPOCHS = "5 epochs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("sums"))


@pytest.fixture(scope="module")
def alike_folder(folder, tmp_path_factory):
    """Half of the pool, by source, begins as the target does."""
    other = shutil.copytree(folder, tmp_path_factory.mktemp("alike") / "sums")
    rows = [json.loads(line) for line in (folder / "pool.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt"] = row["prompt"].replace("pool", "target" if row["source"] == "right" else "other")
    write_lines(other / "pool.jsonl", rows)
    return other


@pytest.fixture(scope="module")
def ours(folder):
    """The run of cads."""
    return cads.train(sums_task(folder), EPOCHS, seed=SEED)


@pytest.fixture(scope="module")
def theirs(folder, tmp_path_factory):
    """The folder of the run in another trainer, its selection and its trainer."""
    out = tmp_path_factory.mktemp("whole")
    return out, *online(sums_task(folder), EPOCHS, out, save_strategy="steps", save_steps=5)


def assert_equal_runs(trained, selection, trainer):
    """The same weights, steps and charges; of the ledger all but the test set and what the trainer measures."""
    assert_same_weights(trained.model, trainer.model)
    assert trainer.state.global_step == len(trained.train_result.losses)
    assert spent(trained.ledger) == spent(selection.ledger)


def spent(ledger):
    return [record for record in ledger.to_json(seconds=False) if record["phase"] != EVALUATE]


class TestEqualToCadsTrain:
    @pytest.mark.parametrize(
        "options",
        [
            {"weighting": "token"},
            {"precision": "bf16"},
            {"peft": LORA},
            {"optimizer": "sgd", "schedule": "linear", "clip_norm": 0.1, "workers": 2},
        ],
        ids=str,
    )
    def test_texts_of_unequal_lengths_and_other_options(self, folder, tmp_path, options):
        trained = cads.train(sums_task(folder, **options), EPOCHS, seed=SEED)
        assert_equal_runs(trained, *online(sums_task(folder, **options), EPOCHS, tmp_path))

    def test_texts_of_unequal_lengths(self, ours, theirs):
        assert_equal_runs(ours, *theirs[1:])

    def test_probes_before_and_after_a_first_phase(self, folder, tmp_path, monkeypatch):
        """Where the budget buys probes enough: here a few do."""
        few = replace(PRETRAINED, fewest_probes=1, first_passes=1)
        monkeypatch.setattr("cads.selectors.online.selector.PRETRAINED", few)
        trained = cads.train(sums_task(folder), EPOCHS, seed=SEED)
        selection, trainer = online(sums_task(folder), EPOCHS, tmp_path)
        assert_equal_runs(trained, selection, trainer)
        assert {"probe of the initial model", "probe"} <= {record["stage"] for record in spent(trained.ledger)}

    @pytest.mark.parametrize(
        ("budget", "alike", "kinds"),
        [("0.5 epochs", False, "target"), ("0.5 epochs", True, "near"), ("4 epochs", True, "all")],
        ids=str,
    )
    def test_the_target_and_its_kind(self, alike_folder, folder, tmp_path, monkeypatch, budget, alike, kinds):
        """And resumed, from one of the first steps and the last but one."""
        compared = replace(PRETRAINED, most_comparing=1.0)
        monkeypatch.setattr("cads.selectors.online.selector.PRETRAINED", compared)
        task, steps = (lambda: sums_task(alike_folder if alike else folder)), {"save_strategy": "steps"}
        trained = cads.train(task(), budget, seed=SEED)
        selection, trainer = online(task(), budget, tmp_path, **steps, save_steps=2, save_total_limit=None)
        assert_equal_runs(trained, selection, trainer)
        found = selection.selection()
        np.testing.assert_array_equal(found.probability, cads.select(task(), budget, seed=SEED).probability)
        selected = 80 if kinds == "all" else found.notes["likeness"]["near"] if kinds == "near" else 0
        assert found.selected.sum() == selected
        assert (found.target_fraction == 1) == (kinds == "target")
        assert kinds == "target" or 20 < found.notes["likeness"]["near"] < 60
        numbers = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
        for number in {numbers[0], numbers[-2]}:
            checkpoint = str(tmp_path / f"checkpoint-{number}")
            resumed, again = online(task(), budget, tmp_path / "again", resume=checkpoint, **steps, save_steps=2)
            assert_same_weights(trainer.model, again.model)
            assert spent(resumed.ledger) == spent(selection.ledger)

    def test_dropout(self, folder, tmp_path):
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=CONTEXT, bos_token_id=2, eos_token_id=2
        )
        config.save_pretrained(folder / "dropout")
        tokenizer().save_pretrained(folder / "dropout")
        trained = cads.train(sums_task(folder, "dropout"), EPOCHS, seed=SEED)
        assert_equal_runs(trained, *online(sums_task(folder, "dropout"), EPOCHS, tmp_path))

    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_weighed_examples_and_accumulated_gradients(self, tmp_path, accumulate):
        trained = cads.train(digits_task(accumulate=accumulate), DIGIT_EPOCHS, seed=SEED)
        selection, trainer = online(digits_task(accumulate=accumulate), DIGIT_EPOCHS, tmp_path)
        assert_equal_runs(trained, selection, trainer)
        chosen = cads.select(digits_task(accumulate=accumulate), DIGIT_EPOCHS, seed=SEED)
        found = selection.selection()
        np.testing.assert_array_equal(found.probability, chosen.probability)
        assert found.notes == chosen.notes
        assert found.pool_hash == chosen.pool_hash
        # The labels were judged: it is no plain mean that was compared.
        assert np.unique(found.probability).size > 50

    def test_two_processes(self, tmp_path):
        def work():
            trained = cads.train(digits_task(accumulate=2), DIGIT_EPOCHS, seed=SEED)
            selection, trainer = online(digits_task(accumulate=2), DIGIT_EPOCHS, tmp_path / "out", save_strategy="no")
            assert_equal_runs(trained, selection, trainer)
            return [float(p.double().sum()) for p in trainer.model.parameters()]

        one, other = spread(2, work, tmp_path / "said")
        assert one == other
        assert isinstance(one[0], float), one

    def test_trl(self, folder, tmp_path, ours):
        pytest.importorskip("trl")
        with pytest.warns(FutureWarning, match="compute_loss_func"):
            selection, trainer = sft(sums_task(folder), EPOCHS, tmp_path)
        assert_equal_runs(ours, selection, trainer)
        # Its metrics take a forward pass of their own in each step.
        assert selection.ledger.entries[EVALUATE, "metrics of the trainer"].flops > 0

    def test_the_sources_may_come_in_any_order(self, folder, tmp_path):
        lines = (folder / "pool.jsonl").read_text().splitlines()
        other = tmp_path / "other"
        write_sums(other)
        (other / "pool.jsonl").write_text("\n".join(sorted(lines, key=lambda x: '"wrong"' not in x)) + "\n")
        trained = cads.train(sums_task(other), EPOCHS, seed=SEED)
        assert_equal_runs(trained, *online(sums_task(other), EPOCHS, tmp_path))


class TestExamples:
    def test_trainer_on_files_without_ids_gives_the_weights_of_the_command(self, folder, tmp_path, monkeypatch):
        parts = {name: [{"path": str(folder / f"{name}.jsonl")}] for name in ("pool", "target")}
        task = {"model": str(folder / "m"), **parts, "n_test": 8, "trainer_compatible": True}
        train = {"batch_size": 8, "learning_rate": 3e-3}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"kind": "language", "task": task, "train": train}))
        words = ["train", tmp_path / "c.yaml", "--budget", EPOCHS, "--out", tmp_path / "ours", "--progress", "false"]
        assert main([str(word) for word in words]) == 0
        words = [folder / "m", folder / "pool.jsonl", folder / "target.jsonl", EPOCHS, tmp_path / "theirs"]
        run_example("online_trainer", words, monkeypatch)
        ours = load_file(next((tmp_path / "ours").rglob("model.safetensors")))
        theirs = load_file(tmp_path / "theirs/model/model.safetensors")
        assert set(ours) == set(theirs)
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
        assert Selection.load(tmp_path / "theirs/selection").probability.size == 80

    def test_trl_on_tokenised_rows_without_ids_equals_a_run_of_cads(self, folder, tmp_path, monkeypatch):
        pytest.importorskip("trl")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        sums_task(folder).model(5).save_pretrained(tmp_path / "m")
        tokenizer().save_pretrained(tmp_path / "m")
        words = [tmp_path / "m", folder / "pool.jsonl", folder / "target.jsonl", EPOCHS, tmp_path / "out"]
        said = run_example("online_sft", words, monkeypatch)
        fresh = said["AutoModelForCausalLM"].from_pretrained(tmp_path / "m")
        rows = {name: said["rows"][name] for name in ("pool", "target")}
        columns = ["input_ids", "labels"]
        task = tokenised_task(
            fresh,
            rows["pool"].select_columns([*columns, "source"]),
            rows["target"].select_columns(columns),
            recipe=said["task"].recipe,
            tokenizer=tokenizer(),
        )
        trained = cads.train(task, EPOCHS, seed=0)
        assert_equal_runs(trained, said["selection"], said["trainer"])
        assert Selection.load(tmp_path / "out/selection").shares.keys() == {"right", "wrong"}


def run_example(name, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    return runpy.run_module(f"experiments.examples.{name}", run_name="__main__")


class TestResume:
    # The first phase has not ended, has ended, and a window of both is under way.
    @pytest.mark.parametrize("step", [5, 10, 20])
    @pytest.mark.parametrize("skipping", [{}, {"ignore_data_skip": True}], ids=str)
    def test_a_resumed_run_equals_an_uninterrupted_one(self, folder, tmp_path, theirs, step, skipping):
        out, selection, trainer = theirs
        resumed = online(
            sums_task(folder), EPOCHS, tmp_path, resume=str(out / f"checkpoint-{step}"), save_steps=5, **skipping
        )
        assert_same_weights(trainer.model, resumed[1].model)
        assert spent(resumed[0].ledger) == spent(selection.ledger)
        one, other = selection.selection(), resumed[0].selection()
        np.testing.assert_array_equal(one.probability, other.probability)
        assert one.notes == other.notes

    def test_of_a_run_that_is_over_trains_nothing(self, folder, tmp_path, theirs):
        """A checkpoint is written where the budget ends."""
        out, _, trainer = theirs
        checkpoint = str(out / f"checkpoint-{trainer.state.global_step}")
        _, resumed = online(sums_task(folder), EPOCHS, tmp_path, resume=checkpoint, save_steps=5)
        assert_same_weights(trainer.model, resumed.model)
        assert resumed.state.global_step == trainer.state.global_step

    def test_in_the_same_process(self, folder, tmp_path):
        selection, trainer = online(sums_task(folder), EPOCHS, tmp_path, save_strategy="steps", save_steps=9)
        before, spent_before = copy.deepcopy(trainer.model), spent(selection.ledger)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
        assert_same_weights(before, trainer.model)
        assert spent(selection.ledger) == spent_before

    def test_of_weighed_examples(self, tmp_path):
        steps = {"save_strategy": "steps", "save_steps": 30}
        _, trainer = online(digits_task(), DIGIT_EPOCHS, tmp_path, **steps)
        for checkpoint in tmp_path.glob("checkpoint-*"):
            _, resumed = online(digits_task(), DIGIT_EPOCHS, tmp_path / "again", resume=str(checkpoint), save_steps=30)
            assert_same_weights(trainer.model, resumed.model)

    def test_in_two_processes(self, tmp_path):
        def work():
            steps = {"save_strategy": "steps", "save_steps": 30}
            _, trainer = online(digits_task(), DIGIT_EPOCHS, tmp_path / "out", **steps)
            checkpoint = str(tmp_path / "out/checkpoint-60")
            _, resumed = online(digits_task(), DIGIT_EPOCHS, tmp_path / "again", resume=checkpoint, save_steps=30)
            assert_same_weights(trainer.model, resumed.model)
            return resumed.state.global_step

        one, other = spread(2, work, tmp_path / "said")
        assert one == other
        assert isinstance(one, int), one

    def test_by_another_selection_is_refused(self, folder, tmp_path, theirs):
        out, *_ = theirs
        with pytest.raises(CheckpointError, match="another selection"):
            online(sums_task(folder), "4 epochs", tmp_path, resume=str(out / "checkpoint-5"))

    @pytest.mark.parametrize("damage", ["none", "AAAA", base64.b64encode(zlib.compress(b"x")).decode()])
    def test_without_a_sound_state_is_refused(self, folder, tmp_path, theirs, damage):
        out, *_ = theirs
        checkpoint = shutil.copytree(out / "checkpoint-5", tmp_path / "checkpoint-5")
        file = checkpoint / "trainer_state.json"
        state = json.loads(file.read_text())
        if damage == "none":
            del state["stateful_callbacks"]["SelectionCallback"]
        else:
            state["stateful_callbacks"]["SelectionCallback"]["attributes"]["stored"]["tensors"] = damage
        file.write_text(json.dumps(state))
        with pytest.raises(CheckpointError, match="no state of a selection" if damage == "none" else "corrupt"):
            online(sums_task(folder), EPOCHS, tmp_path, resume=str(checkpoint))

    def test_with_callbacks_made_anew_is_refused(self, folder, tmp_path, theirs):
        out, *_ = theirs
        with pytest.raises(ConfigError, match="the selection resumes by itself"):
            online(
                sums_task(folder),
                EPOCHS,
                tmp_path,
                resume=str(out / "checkpoint-5"),
                restore_callback_states_from_checkpoint=True,
            )


class TestBudget:
    @pytest.mark.parametrize("budget", ["0.4 epochs", "1 epochs", "2.3 epochs"])
    def test_is_never_exceeded_and_ends_the_run(self, folder, tmp_path, budget):
        selection, trainer = online(sums_task(folder), budget, tmp_path)
        ledger = selection.ledger
        assert ledger.total(SELECT).flops + ledger.total(TRAIN).flops <= ledger.limit
        assert trainer.state.global_step * 8 == ledger.total(TRAIN).usages
        # No further step of examples as long as the longest would have been affordable.
        costs = selection.task.costs
        dearest = max(float(costs.usages(pool).max()) for pool in (selection.task.pool, selection.task.target))
        assert ledger.left < 1.2 * (8 * dearest + costs.optimizer_step)

    def test_ends_a_run_with_the_optimizer_of_the_trainer(self, folder, tmp_path):
        selection = OnlineSelection(sums_task(folder), EPOCHS, seed=SEED)
        arguments = TrainingArguments(str(tmp_path), **QUIET, **selection.settings(), save_strategy="no")
        trainer = Trainer(selection.model(), arguments, **selection.parts())
        trainer.train()
        assert 0 < selection.ledger.left < 0.1 * selection.ledger.limit
        assert trainer.state.global_step < selection.max_steps

    def test_a_run_that_the_trainer_ends_before_says_so(self, folder, tmp_path, caplog):
        selection, _ = online(sums_task(folder), EPOCHS, tmp_path, max_steps=5)
        assert selection.ledger.total(TRAIN).usages == 40
        assert "the trainer stopped at step 5" in caplog.text

    def test_that_buys_no_step_is_refused(self, folder):
        with pytest.raises(BudgetError, match="does not buy one step"):
            OnlineSelection(sums_task(folder), 1000.0)

    def test_of_time_is_refused(self, folder):
        with pytest.raises(BudgetError, match="no number of FLOPs"):
            OnlineSelection(sums_task(folder), "30 minutes")

    def test_evaluations_are_in_the_ledger_and_not_in_the_budget(self, folder, tmp_path, theirs):
        _, plain, trainer = theirs
        rows = [{"input_ids": [7, 8, 9, 10], "labels": [-100, 8, 9, 10]}] * 12
        evaluated, other = online(
            sums_task(folder), EPOCHS, tmp_path, eval_strategy="steps", eval_steps=10, extra={"eval_dataset": rows}
        )
        assert_same_weights(trainer.model, other.model)
        assert spent(plain.ledger) == spent(evaluated.ledger)
        times = sum("eval_loss" in entry for entry in other.state.log_history)
        forward = plain._run.examples.forward_flops((12, 4))
        assert times > 0
        assert evaluated.ledger.entries[EVALUATE, "validation by the trainer"].flops == times * forward

    def test_the_rate_of_the_recipe_is_logged(self, folder, tmp_path):
        _, trainer = online(sums_task(folder), EPOCHS, tmp_path, logging_steps=1)
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        assert max(rates) == pytest.approx(3e-3, rel=0.05)
        assert rates[-1] < 0.02 * max(rates)
        assert len(rates) == trainer.state.global_step


class TestRefusals:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"max_steps": -1}, "an epoch is a window"),
            ({"per_device_train_batch_size": 4}, "not the batch of 8"),
            ({"bf16": True}, "precision = 'bf16' in the trainer"),
            ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
            ({"activation_checkpointing": True}, "counts FLOPs with False"),
            ({"train_sampling_strategy": "sequential"}, "draws the examples"),
            ({"accelerator_config": {"split_batches": True}}, "split_batches"),
            ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ],
        ids=str,
    )
    def test_arguments_that_do_not_go_with_it(self, folder, tmp_path, changed, message):
        with pytest.raises(ConfigError, match=message):
            online(sums_task(folder), EPOCHS, tmp_path, **changed)

    def test_clipping_by_the_trainer_where_examples_are_weighed(self, tmp_path):
        with pytest.raises(ConfigError, match="max_grad_norm = 0"):
            online(digits_task(), "1 epochs", tmp_path, max_grad_norm=1.0)

    @pytest.mark.parametrize("missing", ["train_dataset", "data_collator"])
    def test_parts_that_are_left_out(self, folder, tmp_path, missing):
        from transformers import DataCollatorForSeq2Seq

        selection = OnlineSelection(sums_task(folder), EPOCHS)
        parts = selection.parts()
        parts[missing] = {
            "train_dataset": [{"input_ids": [7, 8], "labels": [-100, 8]}] * 200,
            "data_collator": DataCollatorForSeq2Seq(tokenizer()),
        }[missing]
        arguments = TrainingArguments(str(tmp_path), **QUIET, **selection.settings())
        with pytest.raises(ConfigError, match=r"all that `parts\(\)` returns"):
            Trainer(selection.model(), arguments, **parts).train()

    def test_a_callback_that_is_left_out(self, folder, tmp_path):
        selection = OnlineSelection(sums_task(folder), EPOCHS)
        parts = selection.parts()
        del parts["callbacks"]
        arguments = TrainingArguments(str(tmp_path), **QUIET, **selection.settings())
        with pytest.raises(ConfigError, match="that the selection did not draw"):
            Trainer(selection.model(), arguments, **parts).train()

    def test_a_loss_that_is_not_finite_before_the_update(self, folder, tmp_path):
        selection = OnlineSelection(sums_task(folder), EPOCHS)
        model = selection.model()
        with torch.no_grad():
            model.lm_head.weight[0, 0] = np.nan
        before = copy.deepcopy(model.state_dict())
        # The probe of the initial model meets it first, unless there is nothing to probe.
        selection._run._probes = np.empty(0, dtype=np.int64)
        arguments = TrainingArguments(str(tmp_path), **QUIET, **selection.settings())
        with pytest.raises(NonFiniteError, match="were not updated") as caught:
            Trainer(model, arguments, **selection.parts(model)).train()
        assert caught.value.step == 0
        assert len(caught.value.ids) == 8
        assert all(torch.equal(x, before[name]) or x.isnan().any() for name, x in model.state_dict().items())

    def test_a_batch_that_cannot_be_divided(self, folder):
        with pytest.raises(ConfigError, match="multiple of 3"):
            OnlineSelection(sums_task(folder, accumulate=3), EPOCHS).settings()

    def test_a_second_training(self, theirs):
        _, _, trainer = theirs
        with pytest.raises(ConfigError, match="make a new one"):
            trainer.train()

    def test_a_rate_that_has_no_effect_is_said(self, folder, tmp_path, caplog):
        online(sums_task(folder), "1 epochs", tmp_path, learning_rate=0.5)
        assert "learning_rate = 0.5 of the trainer has no effect" in caplog.text

    def test_preparation_by_trl(self, folder, tmp_path):
        trl = pytest.importorskip("trl")
        selection = OnlineSelection(sums_task(folder), EPOCHS)
        arguments = trl.SFTConfig(str(tmp_path), **QUIET, **selection.settings())
        with pytest.raises(ConfigError, match="skip_prepare_dataset"):
            trl.SFTTrainer(selection.model(), arguments, processing_class=tokenizer(), **selection.parts())


class TestTokenised:
    RECIPE = TrainConfig(batch_size=2)
    GOOD = ({"input_ids": [7, 8, 9], "labels": [-100, 8, 9]},)

    def task(self, folder, rows, **options):
        return tokenised_task(sums_task(folder).model(0), list(rows), list(self.GOOD), recipe=self.RECIPE, **options)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"input_ids": [7, 8], "labels": [-100, -100]}, "no label that can be predicted"),
            ({"input_ids": [7, 8], "labels": [7, -100]}, "no label that can be predicted"),
            ({"input_ids": [7, 8], "labels": [8, 9]}, "are not their input_ids"),
            ({"input_ids": [7, 8], "labels": [8]}, "are not their input_ids"),
            ({"input_ids": [7] * (CONTEXT + 1), "labels": [7] * (CONTEXT + 1)}, "cut them"),
        ],
    )
    def test_rows_that_cannot_be_trained_on_are_refused(self, folder, row, message):
        with pytest.raises(DataError, match=message):
            self.task(folder, [*self.GOOD, row])

    def test_no_rows_are_refused(self, folder):
        with pytest.raises(DataError, match="has no row"):
            self.task(folder, [])

    def test_a_source_in_some_rows_alone_is_refused(self, folder):
        with pytest.raises(DataError, match="have no 'source'"):
            self.task(folder, [{**self.GOOD[0], "source": "a"}, *self.GOOD])

    def test_what_is_not_used_and_what_is_guessed_is_said(self, folder, caplog):
        task = self.task(folder, [{"input_ids": [7, 8, 9], "kind": "x"}])
        assert "not used: ['kind']" in caplog.text
        assert "all of their tokens are learned" in caplog.text
        assert task.pool.examples.answers.tolist() == [2]


class TestGuide:
    """The code in `docs/trainers.md` runs as it stands."""

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_its_code_runs(self, folder, tmp_path, monkeypatch, number):
        code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/trainers.md").read_text(), re.DOTALL)[number]
        for package in ("trl", "lightning"):
            if f"import {package}" in code or f"from {package}" in code:
                pytest.importorskip(package)
        write_sums(tmp_path)
        sums_task(folder).model(5).save_pretrained(tmp_path / "model")
        tokenizer().save_pretrained(tmp_path / "model")
        monkeypatch.chdir(tmp_path)
        said = {}
        exec(code, said)
        assert said["selection"].ledger.total(TRAIN).flops > 0
        trainer = said["trainer"]
        assert (trainer.global_step if number == 2 else trainer.state.global_step) > 10
