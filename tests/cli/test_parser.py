"""What is refused on the command line or in a file is said in plain words, with the name that was probably meant."""

import pytest
import yaml

from cads.cli.main import main


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": {"datset": "digits"}}, "task.datset is unknown: did you mean task.dataset?"),
        ({"tsk": {"dataset": "digits"}}, "tsk.dataset is unknown: did you mean task.dataset?"),
        ({"task": {"learning_rate": 1.0}}, "task.learning_rate is unknown: did you mean train.learning_rate?"),
        ({"task": {"n_pool": "many"}}, "task.n_pool = many: it must be a whole number or null"),
        ({"train": {"batch_size": 3.5}}, "train.batch_size = 3.5: it must be a whole number"),
        ({"task": {"dataset": "digts"}}, "task.dataset = digts: it must be one of digits, fashion-mnist,"),
        ({"task": {"sources": [{"nme": "a"}]}}, "an item of task.sources: nme is unknown: did you mean name?"),
        ({"task": {"sources": [{"name": "a", "label_noise": "high"}]}}, "label_noise = high: it must be a number"),
        ({"options": {"granularit": "source"}}, "options.granularit is unknown: did you mean options.granularity?"),
        ({"zzz": 1}, "zzz is unknown\n"),
        ({"task": {"colour": 1}}, "task.colour is unknown\n"),
    ],
)
def test_a_file_that_is_refused(tmp_path, capsys, settings, words):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as exit_:
        main(["plan", str(tmp_path / "c.yaml")])
    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert said.startswith(f"cads plan: {words}" if "label_noise" not in words else "cads plan: task.sources: ")
    assert words in said
    assert "`cads plan --help` lists all settings." in said
    assert not any(word in said for word in ("<class", "typing", "Parser key", "NoneType", "Traceback"))


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("select", ["--train.learning_rte", "3"], "train.learning_rte is unknown: did you mean train.learning_rate?"),
        ("train", ["--seed", "x"], "seed = x: it must be a whole number"),
        ("plan", ["--budget"], "argument --budget: expected one argument"),
        ("compare", ["--seds", "3"], "seds is unknown: did you mean seeds?"),
        ("export", ["run", "--to", "xml", "--output", "o"], "to = xml: it must be one of jsonl, parquet, files"),
    ],
)
def test_a_flag_that_is_refused(capsys, command, flags, words):
    with pytest.raises(SystemExit) as exit_:
        main([command, *flags])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith(f"cads {command}: {words}")
