"""The command line: what a user types, what is written, and what is said about bad input."""

import json
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from cads.cli.main import main
from cads.recipe import TrainConfig
from cads.registry import SELECTORS, names, selector_class, task_config_class
from cads.runtime.checkpoint import CheckpointConfig
from cads.selection import Selection
from cads.study.grid import Grid
from cads.tasks.vision.config import VisionConfig

CONFIG = """
task:
  hidden: 16
  n_pool: 80
  n_target: 40
  n_test: 30
  sources:
    - {name: clean}
    - {name: noise 90 %, label_noise: 0.9, size: 40}
train: {batch_size: 8}
budget: 2 epochs
method: random
seed: 3
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    return str(file)


@pytest.fixture
def cads(capsys):
    """Runs a command in this process; returns exit status, stdout and stderr (words divided by single spaces)."""

    def run(*argv):
        try:
            status = main([str(word) for word in argv])
        except SystemExit as exit_:
            status = exit_.code
        captured = capsys.readouterr()
        return status, captured.out, " ".join(captured.err.split())

    return run


def same(one, other):
    for file in ("selection.json", "scores.parquet"):
        assert (one / "selection" / file).read_bytes() == (other / "selection" / file).read_bytes()


class TestRuns:
    def test_select_then_train(self, cads, config, tmp_path):
        out = tmp_path / "run"
        status, shown, errors = cads("select", config, "--out", out)
        assert (status, errors) == (0, "")
        selection = Selection.load(out)
        assert selection.method == "random"
        assert selection.seed == 3
        assert f"{int(selection.selected.sum())} of 80 examples" in shown
        assert sorted(f.name for f in out.iterdir()) == ["config.yaml", "select.json", "selection", "tensorboard"]

        status, shown, errors = cads("train", config, "--selection", out)
        assert (status, errors) == (0, "")
        results = json.loads((out / "train" / "results.json").read_text())
        assert f"{results['metrics']['accuracy']:.4f}" in shown
        assert results["steps"] == 20
        assert {"config.yaml", "model.safetensors", "results.json"} <= {f.name for f in (out / "train").iterdir()}

    @pytest.mark.parametrize("method", ["random", "cads"])
    def test_one_command_selects_and_trains(self, cads, config, tmp_path, monkeypatch, method):
        """The model and the Selection are those of the two commands, and one ledger has both."""
        monkeypatch.chdir(tmp_path)
        flags = ("--method", method, "--budget", "12 epochs")
        status, shown, errors = cads("train", config, *flags)
        assert (status, errors) == (0, "")
        out = tmp_path / "runs" / ("config" if method == "cads" else f"config-{method}")
        assert f"runs/{out.name}" in shown
        assert "share of training" in shown
        assert "nothing to do" in cads("train", config, *flags)[1]
        assert cads("select", config, *flags, "--out", "two")[0] == 0
        assert cads("train", config, *flags, "--selection", "two")[0] == 0
        two = tmp_path / "two" / "train"
        assert (out / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
        assert Selection.load(out).content_hash == Selection.load(tmp_path / "two").content_hash
        one, other = (json.loads((folder / "results.json").read_text())["ledger"] for folder in (out, two))
        assert [(e["phase"], e["stage"], e["flops"]) for e in one] == [
            (e["phase"], e["stage"], e["flops"]) for e in other
        ]

    def test_training_on_the_inner_folder_writes_beside_it(self, cads, config, tmp_path):
        cads("select", config, "--out", tmp_path / "run")
        assert cads("train", config, "--selection", tmp_path / "run" / "selection")[0] == 0
        assert (tmp_path / "run" / "train" / "results.json").exists()
        assert cads("select", config, "--out", tmp_path / "run")[0] == 0
        assert (tmp_path / "run" / "train" / "results.json").exists()

    @pytest.mark.parametrize("method", ["random", "search"])
    def test_the_written_config_replays_the_run(self, cads, config, tmp_path, method):
        first, second = tmp_path / "first", tmp_path / "second"
        assert cads("select", config, "--method", method, "--out", first)[0] == 0
        assert cads("select", first / "config.yaml", "--out", second)[0] == 0
        same(first, second)
        ours, replayed = (yaml.safe_load((out / "config.yaml").read_text()) for out in (first, second))
        assert {**ours, "out": None} == {**replayed, "out": None}

    def test_the_written_config_replays_the_training(self, cads, config, tmp_path):
        cads("select", config, "--out", tmp_path / "run")
        assert cads("train", config, "--selection", tmp_path / "run", "--out", tmp_path / "first")[0] == 0
        assert cads("train", tmp_path / "first" / "config.yaml", "--out", tmp_path / "second")[0] == 0
        one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
        assert one == two

    def test_printed_config_replays_the_run(self, cads, config, tmp_path):
        flags = ("--method", "source", "--options.name", "noise 90 %", "--train.learning_rate", "1e-2")
        status, printed, _ = cads("select", config, *flags, "--print_config")
        assert status == 0
        (tmp_path / "printed.yaml").write_text(printed)
        cads("select", config, *flags, "--out", tmp_path / "first")
        cads("select", tmp_path / "printed.yaml", "--out", tmp_path / "second")
        same(tmp_path / "first", tmp_path / "second")
        assert Selection.load(tmp_path / "second").config == {"name": "noise 90 %"}

    def test_printed_config_is_whole(self, cads):
        status, printed, _ = cads("select", "--print_config")
        assert status == 0
        whole = yaml.safe_load(printed)
        for section, kind in (("task", VisionConfig), ("train", TrainConfig), ("options", selector_class("cads"))):
            assert set(whole[section]) == {f.name for f in fields(kind)}

    @pytest.mark.parametrize(
        ("budget", "unit"), [("2e6", "FLOPs"), ("2000000", "FLOPs"), ("2.0e+6", "FLOPs"), ("200 usages", "usages")]
    )
    def test_budgets_in_a_file_and_as_a_flag(self, cads, config, tmp_path, budget, unit):
        Path(config).write_text(CONFIG.replace("2 epochs", budget))
        for flags in ((), ("--budget", budget)):
            assert cads("select", config, *flags, "--out", tmp_path / "run")[0] == 0
            found = Selection.load(tmp_path / "run").budget
            assert (found.amount, found.unit) == (float(budget.split()[0]), unit)
        assert cads("select", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again")[0] == 0
        same(tmp_path / "run", tmp_path / "again")

    def test_flags_win_over_the_file_and_the_last_one_over_others(self, cads, config, tmp_path):
        flags = ("--method=full", "--method", "random", "--seed=1", "--seed", "2", "--options.fraction", "0.25")
        assert cads("select", config, *flags, "--out", tmp_path / "run")[0] == 0
        selection = Selection.load(tmp_path / "run")
        assert (selection.method, selection.seed, selection.selected.sum()) == ("random", 2, 20)

    def test_options_belong_to_the_method_of_the_file(self, cads, config, tmp_path):
        Path(config).write_text(CONFIG + "options: {fraction: 0.25}\nselectors: {joint: {target_fraction: 0.5}}\n")
        assert cads("select", config, "--out", tmp_path / "a")[0] == 0
        assert Selection.load(tmp_path / "a").selected.sum() == 20
        assert cads("select", config, "--method", "joint", "--out", tmp_path / "b")[0] == 0
        assert Selection.load(tmp_path / "b").target_fraction == 0.5

    def test_options_without_a_method_are_those_of_the_default(self, cads, config, tmp_path):
        Path(config).write_text(CONFIG.replace("method: random", "options: {granularity: source}"))
        assert cads("select", config, "--out", tmp_path / "run")[0] == 0
        written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert written["method"] == "cads"
        assert written["options"]["granularity"] == "source"

    def test_sources_as_a_flag(self, cads, config, tmp_path):
        flags = ("--task.sources", "[{name: one, size: 20}, {name: two, transform: invert}]", "--method", "full")
        assert cads("select", config, *flags, "--out", tmp_path / "run")[0] == 0
        assert [row[:2] for row in Selection.load(tmp_path / "run").source_counts()] == [("one", 20), ("two", 60)]
        written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["task"]["sources"]
        assert [s["label_noise"] for s in written] == [0, 0], "the sources of the file are gone, item by item"

    def test_sections_left_empty_are_defaults(self, cads, tmp_path):
        (tmp_path / "c.yaml").write_text("task:\ntrain:\noptions:\nselectors:\nmethod: full\n")
        status, printed, _ = cads("select", tmp_path / "c.yaml", "--print_config")
        assert status == 0
        assert yaml.safe_load(printed)["train"]["batch_size"] == TrainConfig().batch_size

    def test_nothing_is_deprecated(self, cads, config, tmp_path):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cads("select", config, "--out", tmp_path / "run")
            cads("train", config, "--selection", tmp_path / "run")
        ours = [w for w in caught if "jsonargparse" in str(w.category).lower() or "cads" in Path(w.filename).parts]
        assert not [str(w.message) for w in ours if "Deprecation" in w.category.__name__]


class TestDataFlags:
    @pytest.fixture
    def files(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("a/train.jsonl", "b/train.jsonl", "chats.jsonl.gz", "val.jsonl"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        for name in ("images", "more"):
            (tmp_path / name).mkdir()
        return tmp_path

    def task(self, cads, *flags):
        status, shown, errors = cads("train", *flags, "--print_config")
        assert (status, errors) == (0, "")
        config = yaml.safe_load(shown)
        assert not {"pool", "target", "test", "model"} & set(config)
        return config["kind"], config["task"]

    def test_files_are_sources_of_texts(self, cads, files):
        kind, task = self.task(
            cads, "--pool", "a/train.jsonl", "--pool", "chats.jsonl.gz", "--target", "val.jsonl", "--model", "m"
        )
        assert kind == "language"
        assert [source["path"] for source in task["pool"]] == ["a/train.jsonl", "chats.jsonl.gz"]
        assert [source["path"] for source in task["target"]] == ["val.jsonl"]
        assert (task["test"], task["model"]) == ([], "m")

    def test_a_folder_is_images(self, cads, files):
        kind, task = self.task(cads, "--pool", "images", "--target", "more", "--model", "cnn")
        assert kind == "vision"
        assert [task[name] for name in ("dataset", "path", "target_path", "model")] == [
            "folder",
            "images",
            "more",
            "cnn",
        ]

    def test_they_win_over_the_file(self, cads, files, config):
        _, task = self.task(cads, config, "--model", "cnn")
        assert (task["model"], [source["name"] for source in task["sources"]]) == ("cnn", ["clean", "noise 90 %"])

    @pytest.mark.parametrize(
        ("flags", "match"),
        [
            (("--pool", "none.jsonl"), "none.jsonl: no such file or folder"),
            (("--pool", "images", "--target", "val.jsonl"), "are folders and the other paths are files"),
            (("--pool", "images", "--pool", "more"), "--pool is given 2 folders: put them into one"),
        ],
    )
    def test_what_makes_no_task_is_refused(self, cads, files, flags, match):
        refused(cads("train", *flags), match)


class TestHelp:
    @pytest.mark.parametrize(("command", "method"), [("train", "search"), *(("select", m) for m in names(SELECTORS))])
    def test_every_field_is_listed_and_explained(self, cads, command, method):
        status, shown, _ = cads(command, "--method", method, "--help")
        assert status == 0
        entries = dict(re.findall(r"^  --([\w.]+)(.*?)(?=^  -|^\S|\Z)", shown, re.MULTILINE | re.DOTALL))
        for section, kind in (("task", VisionConfig), ("train", TrainConfig), ("options", selector_class(method))):
            for field in fields(kind):
                entry = " ".join(entries[f"{section}.{field.name}"].split())
                explained = re.sub(r"\(?(required, )?type: .*", "", entry)
                assert len(re.findall(r"[a-z]{2,}", explained)) >= 2, f"{section}.{field.name}: {entry!r}"
        for name in ("config", "kind", "method", "budget", "count_selection", "seed", "out", "track"):
            assert name in entries

    @pytest.mark.parametrize("kind", ["language", "vision"])
    def test_every_field_of_a_grid_is_listed_and_explained(self, cads, kind):
        status, shown, _ = cads("compare", "--kind", kind, "--help")
        assert status == 0
        entries = dict(re.findall(r"^  --([\w.-]+)(.*?)(?=^  -|^\S|\Z)", shown, re.MULTILINE | re.DOTALL))
        sections = (("task", task_config_class(kind)), ("train", TrainConfig), ("checkpoint", CheckpointConfig))
        wanted = {f"{section}.{field.name}" for section, cls in sections for field in fields(cls)}
        wanted |= {field.name for field in fields(Grid)} - {"task", "train", "checkpoint"}
        for name in wanted | {"out", "shard", "dry-run", "import"}:
            explained = re.sub(r"\(?(required, )?type: .*", "", " ".join(entries[name].split()))
            assert len(re.findall(r"[a-z]{2,}", explained)) >= 2, f"{name}: {explained!r}"

    def test_every_field_of_a_report_is_explained(self, cads):
        status, shown, _ = cads("report", "--help")
        assert status == 0
        for text in ("folder of `cads compare`", "HTML file", "Another metric"):
            assert text in " ".join(shown.split())

    @pytest.mark.parametrize("command", ["check", "plan", "select", "train", "compare"])
    def test_how_to_see_the_fields_of_other_kinds_is_said(self, cads, command):
        shown = {kind: " ".join(cads(command, "--kind", kind, "--help")[1].split()) for kind in ("language", "vision")}
        assert "--task.model MODEL" in shown["vision"] != shown["language"]
        assert "--task.peft" in shown["language"]
        assert "--task.peft" not in shown["vision"]
        for kind, text in shown.items():
            assert f"The fields of task are those of kind {kind}" in text
            assert f"`cads {command} --kind KIND" in text

    def test_the_docstrings_are_what_is_shown(self, cads):
        shown = " ".join(cads("select", "--help")[1].split())
        for text in ("Examples a step.", "mlp: hidden units.", "What has a probability of its own"):
            assert text in shown

    def test_commands_are_listed(self, cads):
        status, shown, _ = cads("--help")
        assert status == 0
        assert "select" in shown
        assert "train" in shown
        assert cads()[0] == 2

    def test_the_version_is_said(self, cads):
        assert cads("--version")[:2] == (0, f"cads {version('cads-select')}\n")

    @pytest.mark.parametrize("words", ["import cads", "main(['--help'])", "main(['--version'])", "main(['selct'])"])
    def test_help_and_version_load_no_library(self, words):
        """They come at once: nothing of torch, transformers, numpy or scipy is imported for them."""
        code = f"import sys; from cads.cli.main import main; {words}; print(sorted(sys.modules), file=sys.stderr)"
        code = code.replace("from cads.cli.main import main; ", "") if words.startswith("import") else code
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        loaded = {name.split(".")[0] for name in re.findall(r"'([\w.]+)'", done.stderr)}
        assert "cads" in loaded
        assert not loaded & {"torch", "transformers", "numpy", "scipy", "jsonargparse", "rich", "yaml"}

    def test_the_console_script(self):
        script = Path(sys.executable).parent / "cads"
        done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: cads COMMAND")
        assert done.stderr == ""


BAD_FLAGS = {
    "unknown flag": ("--colour 3", "colour is unknown"),
    "unknown field": ("--task.colour 3", "task.colour is unknown"),
    "shortened flag": ("--budg 3", "budg is unknown: did you mean budget?"),
    "unknown method": ("--method cads-z", "'cads-z' is unknown; did you mean 'cads-"),
    "far method": ("--method qqq", "Installed: best-of, best-source, bilevel"),
    "unknown kind": ("--kind visoin", "kind of task 'visoin' is unknown; did you mean 'vision'"),
    "unknown data set": ("--task.dataset digitz", "digits"),
    "unknown model": ("--task.model resnet19", "resnet1"),
    "budget of nothing": ("--budget 0", "must be a positive, finite number"),
    "negative budget": ("--budget=-3", "must be a positive, finite number"),
    "infinite budget": ("--budget inf", "does not parse"),
    "budget in euros": ("--budget 5€", "does not parse: write a number and FLOPs"),
    "budget in miles": ("--budget 5miles", "does not parse: write a number and FLOPs"),
    "budget below a step": ("--budget 1000", "does not buy one step of 8 examples"),
    "text for a number": ("--task.hidden wide", "task.hidden"),
    "seed of text": ("--seed x", "seed"),
    "negative seed": ("--seed=-1", "seed = -1: it must be >= 0"),
    "batch of none": ("--train.batch_size 0", "batch_size = 0: it must be positive"),
    "too large a pool": ("--task.n_pool 100000", "n_pool = 100000"),
    "missing option": ("--method source", "options.name"),
    "option of another": ("--method full --options.fraction 0.5", "options.fraction is unknown"),
    "unknown source": ("--method source --options.name dirty", "'dirty' is no source"),
    "unknown metric": ("--method search --options.outer beauty", "outer = 'beauty' is no metric"),
    "metric of which more is better": ("--method search --options.outer accuracy", "that can be minimised"),
    "bad share": ("--options.fraction 2", "fraction = 2"),
    "no such source field": ("--task.sources [{nam:a}]", "source"),
    "second file": ("other.yaml", "other.yaml"),
    "no file": ("--config /nowhere/c.yaml", "'/nowhere/c.yaml' cannot be read: No such file"),
    "a folder as file": ("--config /tmp", "'/tmp' cannot be read: Is a directory"),
    "flag without value": ("--method", "--method"),
}


def refused(answer, match):
    """Non-zero status, and a short message that says `match`, without a stack trace."""
    status, _, errors = answer
    assert status in (1, 2)
    assert match in errors
    assert "Traceback" not in errors
    assert len(errors) < 1500


@pytest.mark.parametrize("what", BAD_FLAGS)
def test_bad_flags_are_refused(cads, config, tmp_path, what):
    flags, match = BAD_FLAGS[what]
    refused(cads("select", config, "--out", tmp_path / "run", *flags.split()), match)
    assert not (tmp_path / "run" / "selection").exists()


BAD_FILES = {
    "list": ("- 1\n- 2\n", "must map names to values, and it is a list"),
    "text": ("just words", "must map names to values, and it is text"),
    "empty": ("", "must map names to values, and it is empty"),
    "no YAML": ("task: [", "is no YAML"),
    "no text": (b"\xff\xfe\x00\xd8", "is no YAML"),
    "nested too deep": ("[" * 2_000, "is no YAML"),
    "unknown key": ("colour: 3", "colour"),
    "unknown key of the task": ("task: {colour: 3}", "colour"),
    "unknown key of the training": ("train: {colour: 3}", "colour"),
    "unknown option": ("method: full\noptions: {colour: 3}", "colour"),
    "unknown option of another": ("selectors: {joint: {colour: 3}}", "colour"),
    "unknown key of a source": ("task: {sources: [{name: a, colour: 3}]}", "colour"),
    "number as key": ("1: 2", "Key must be a string"),
    "task is a number": ("task: 5", "task = 5: it must map names to values"),
    "training is a list": ("train: [1]", "train = [1]: it must map names to values"),
    "options are text": ("method: full\noptions: x", "options = 'x': it must map names to values"),
    "selectors are a list": ("selectors: [1]", "selectors = [1]: it must map names to values"),
    "selector is a number": ("selectors: {search: 5}", "options 5 of method 'search' must map names to values"),
    "unknown selector": ("selectors: {cads-x: {}}", "method 'cads-x' is unknown"),
    "method is a list": ("method: [full]", "method = ['full']: it must be a name"),
    "kind is a number": ("kind: 5", "kind of task = 5: it must be a name"),
    "seed is no integer": ("method: full\nseed: 1.5", "seed"),
    "budget is a list": ("method: full\nbudget: [1]", "budget"),
    "source is a number": ("task: {sources: [5]}", "sources"),
    "sources are a number": ("task: {sources: 5}", "sources"),
    "source without name": ("task: {sources: [{label_noise: 0.5}]}", "name"),
    "source with too much noise": ("task: {sources: [{name: a, label_noise: 2}]}", "label_noise = 2"),
    "two sources of one name": ("task: {sources: [{name: a}, {name: a}]}", "each needs its own name"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files_are_refused(cads, tmp_path, what):
    content, match = BAD_FILES[what]
    file = tmp_path / "bad.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(cads("select", file, "--out", tmp_path / "run"), match)
    assert not (tmp_path / "run").exists()


class TestRefused:
    def test_unknown_command(self, cads):
        refused(cads("selct"), "command 'selct' is unknown: did you mean select? All: init, check, plan, select, train")
        refused(cads("zzz"), "command 'zzz' is unknown: use one of init, check, plan, select, train")

    def test_train_on_a_selection_that_is_not_there(self, cads, config, tmp_path):
        refused(cads("train", config, "--selection", tmp_path / "none"), "does not exist")

    def test_train_on_a_corrupt_selection(self, cads, config, tmp_path):
        cads("select", config, "--out", tmp_path / "run")
        (tmp_path / "run" / "selection" / "scores.parquet").write_bytes(b"PAR1")
        refused(cads("train", config, "--selection", tmp_path / "run"), "cannot be read")

    def test_train_on_another_pool(self, cads, config, tmp_path):
        cads("select", config, "--out", tmp_path / "run")
        answer = cads("train", config, "--selection", tmp_path / "run", "--task.data_seed", 1)
        refused(answer, "selected ids are not in the pool")

    def test_a_budget_that_selection_has_eaten(self, cads, config, tmp_path):
        flags = ("--method", "search", "--budget", "8 epochs")
        cads("select", config, *flags, "--out", tmp_path / "run")
        answer = cads("train", config, "--selection", tmp_path / "run", "--count_selection", "true")
        refused(answer, "nothing is left to train with; raise the budget, or do not count selection")

    def test_out_is_a_file(self, cads, config, tmp_path):
        (tmp_path / "file").write_text("mine")
        refused(cads("select", config, "--out", tmp_path / "file"), "Not a directory")
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize("method", ["random", "search"])
    def test_out_holds_something_else_is_said_before_compute(self, cads, config, tmp_path, method, monkeypatch):
        (tmp_path / "run" / "selection").mkdir(parents=True)
        (tmp_path / "run" / "selection" / "thesis.tex").write_text("mine")
        monkeypatch.setattr(VisionConfig, "build", lambda *_: pytest.fail("data was loaded first"))
        answer = cads("select", config, "--method", method, "--out", tmp_path / "run")
        refused(answer, "choose another folder")


def test_control_c_ends_a_grid_without_a_traceback(cads, monkeypatch):
    def stopped(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("cads.cli.study_commands.compare", stopped)
    assert cads("compare") == (130, "", "cads: stopped by SIGINT; what was finished is kept")
