"""What a newcomer gets wrong is said in words, before anything is spent."""

import logging

import numpy as np
import pytest
from PIL import Image

from cads.cli.config import read
from cads.cli.main import main
from cads.cli.settings import CheckSettings, TrainSettings
from cads.errors import BudgetError
from cads.runtime.checkpoint import differences
from tests.support.tiny_llama import conversations, model_folder, write_lines


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


@pytest.fixture
def chats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = conversations(60)
    for name, part in (("one", rows[:25]), ("two", rows[25:50]), ("val", rows[50:])):
        write_lines(tmp_path / f"{name}.jsonl", part)
    model_folder(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("budget", ["three epochs", "3 parsecs", "$5", "-1 epochs"])
@pytest.mark.parametrize("settings", [TrainSettings, CheckSettings])
def test_a_budget_that_is_none_is_refused_before_data_is_read(settings, budget):
    with pytest.raises(BudgetError, match=r"does not parse|must be a positive"):
        read(settings, ["--pool", __file__, "--target", __file__, f"--budget={budget}"])


def test_without_data_the_digits_are_said(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    read(TrainSettings, ["--budget", "1 epochs"])
    (said,) = messages(caplog)
    assert said == "no data is named (a configuration, or --pool): the digits of scikit-learn are used"
    (tmp_path / "cads.yaml").write_text("task: {dataset: digits}\n")
    read(TrainSettings, [])
    assert messages(caplog)[1].endswith("; `cads train cads.yaml` takes the file here")
    for words in (["cads.yaml"], ["--task.dataset", "digits"]):
        read(TrainSettings, words)
    assert len(messages(caplog)) == 2


def test_a_target_that_nobody_gave_is_said(chats, caplog):
    assert main(["init", "one.jsonl", "two.jsonl", "--model", "model"]) == 0
    assert main(["check", "cads.yaml"]) == 0
    assert main(["check", "--pool", "one.jsonl", "--target", "val.jsonl", "--model", "model"]) == 0
    said = [message for message in messages(caplog) if "no target is given" in message]
    assert len(said) == 2
    assert said[0].startswith("no target is given: 4 examples are taken out of the pool for it")
    assert any(message.startswith("no test set is given: 5 of the 10 examples of the") for message in messages(caplog))
    assert any(message.startswith("no test set is given: 10 examples are taken out") for message in messages(caplog))


def test_a_target_of_images_that_nobody_gave_is_said_once(tmp_path, caplog):
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(15):
            image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
            image.save(tmp_path / "photos" / label / f"{i}.png")
    (tmp_path / "photos" / "cat" / "3.png").write_bytes(b"no image")
    with caplog.at_level(logging.INFO, "cads.tasks"):
        assert main(["check", "--pool", str(tmp_path / "photos"), "--model", "mlp", "--task.drop", "true"]) == 0
    assert sum("no target is given: 2 examples" in message for message in messages(caplog)) == 1
    assert sum("no test set is given: 5 examples" in message for message in messages(caplog)) == 1


def test_one_training_has_no_bars_of_others_and_is_no_grid(chats, capsys):
    words = ["--target", "val.jsonl", "--model", "model", "--budget", "1 epochs", "--progress", "false"]
    words += ["--train.batch_size", "4", "--track", "null", "--out", "run"]
    assert main(["train", "--pool", "one.jsonl", "--pool", "two.jsonl", *words]) == 0
    assert "Writing model shards" not in capsys.readouterr().err
    assert main(["report", "run"]) == 1
    assert "its README.md reports on it" in " ".join(capsys.readouterr().err.split())
    assert main(["train", "--pool", "one.jsonl", *words]) == 1
    refusal = " ".join(capsys.readouterr().err.split())
    assert "settings.task.pool has changed" in refusal
    assert "None" not in refusal


def test_what_has_changed_is_in_the_words_of_configurations():
    changed = differences({"a": None, "b": True, "c": ["x"] * 40}, {"a": "x", "b": False, "c": []})
    assert changed == ["a was null, now 'x'", "b was true, now false", "c has changed"]
