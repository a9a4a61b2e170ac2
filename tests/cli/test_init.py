"""`cads init` says what files and folders are, and writes a configuration that `check` and `train` take as it is."""

import numpy as np
import pytest
import yaml
from PIL import Image

from cads.cli.main import main
from tests.support.tiny_llama import conversations, model_folder, sums, write_lines


@pytest.fixture
def cads(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder; returns exit status and what was printed, tables without their frames."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        try:
            status = main([*map(str, words)])
        except SystemExit as exit_:
            status = exit_.code
        captured = capsys.readouterr()
        out = "\n".join(" ".join(line.replace("│", " ").split()) for line in captured.out.splitlines())
        return status, out, " ".join(captured.err.split())

    return run


def written(path="cads.yaml"):
    with open(path) as file:
        return yaml.safe_load(file)


def images(folder, sizes=((16, 16),), n=12):
    """Random images, class/file; of each size in turn."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            width, height = sizes[i % len(sizes)]
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_chats_with_a_target_by_its_name(cads, tmp_path):
    model_folder(tmp_path / "llama")
    rows = conversations(60)
    for name, part in (("chats", rows[:40]), ("val", rows[40:])):
        write_lines(tmp_path / f"{name}.jsonl", part)
    status, out, _ = cads("init", "chats.jsonl", "val.jsonl", "--model", "llama")
    assert status == 0
    assert "chats.jsonl pool 40 messages, id" in out
    assert "by name the target: val.jsonl" in out
    assert "target: 0 of 10 examples are in the pool too" in out
    config = written()
    assert config["kind"] == "language"
    assert config["task"] == {"model": "llama", "pool": [{"path": "chats.jsonl"}], "target": [{"path": "val.jsonl"}]}
    text = (tmp_path / "cads.yaml").read_text()
    assert "# max_tokens: " in text
    assert max(map(len, text.splitlines())) <= 110
    assert cads("check", "cads.yaml")[0] == 0
    assert cads("train", "cads.yaml", "--progress", "false", "--out", "run")[0] == 0
    assert (tmp_path / "run" / "results.json").exists()


def test_a_folder_of_files_that_share_ids(cads, tmp_path):
    model_folder(tmp_path / "llama")
    rows = sums(80)
    for name, part in (("train/a", rows[:30] + rows[:2]), ("train/b", rows[30:50]), ("val", rows[50:])):
        path = tmp_path / "d" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        named = [{"id": i, "question": r["prompt"], "answer": r["response"], "n": i} for i, r in enumerate(part)]
        write_lines(path, named)
    (tmp_path / "d" / "readme.pdf").write_text("x")
    status, out, _ = cads("init", "d", "--model", "llama")
    assert status == 0
    assert "d/train/a.jsonl pool 32 prompt = question, response = answer, id" in out
    assert "d holds texts; not used: readme.pdf" in out
    assert "d/val.jsonl: columns not used: n" in out
    assert "pool 52 50 " in out
    task = written()["task"]
    assert task["pool"][0] == {"path": "d/train/a.jsonl", "columns": {"id": "a-{id}"}}
    assert task["target"] == [{"path": "d/val.jsonl", "columns": {"id": "val-{id}"}}]
    assert cads("check", "cads.yaml")[0] == 0


def test_models_and_runs_beside_the_files_are_no_data(cads, tmp_path):
    model_folder(tmp_path / "llama")
    for name, rows in (("chats", conversations(20)), ("val", conversations(30)[20:])):
        write_lines(tmp_path / f"{name}.jsonl", rows)
    run = tmp_path / "runs" / "chats"
    (run / "selection").mkdir(parents=True)
    for name in ("results.json", "train.json", "selection/selection.json"):
        (run / name).write_text('{"a": 1}')
    status, text, _ = cads("init", ".", "--model", "llama")
    assert status == 0
    assert "not used are folders of models and of runs: llama, runs/chats" in text
    assert [entry["path"] for entry in written()["task"]["pool"]] == ["./chats.jsonl"]


def test_columns_that_say_nothing_are_refused_with_the_way_to_name_them(cads, tmp_path):
    write_lines(tmp_path / "pool.jsonl", [{"data": {"question": "a", "answer": "b"}, "lang": "en"}])
    status, _, error = cads("init", "pool.jsonl")
    assert status == 1
    assert "`cads init --template prompts` writes a configuration to put this into" in " ".join(error.split())
    model_folder(tmp_path / "llama")
    pool = "[{path: pool.jsonl, columns: {prompt: data.question, response: lang}}]"
    status, _, error = cads("check", "--kind", "language", "--task.model", "llama", "--task.pool", pool)
    assert status == 1
    assert "['data.question'] lie within a column: write them as columns of their own" in " ".join(error.split())


def test_one_file_with_a_column_of_sources_and_no_model_at_hand(cads, tmp_path):
    rows = [{"prompt": r["prompt"], "response": r["response"], "Topic": r["source"]} for r in sums(60)]
    write_lines(tmp_path / "one.jsonl", rows[:55] + rows[:5])
    status, out, _ = cads("init", "one.jsonl")
    assert status == 0
    assert "its column 'Topic' is taken for the source of each row" in out
    assert "characters" in out
    assert "could" not in out.split("Lengths are in characters")[0]
    task = written()["task"]
    assert task["pool"] == [{"path": "one.jsonl", "columns": {"source": "Topic"}}]
    assert task["peft"]["type"] == "lora"
    assert "right " in out


def test_rows_that_cannot_be_used_are_left_out(cads, tmp_path):
    model_folder(tmp_path / "llama")
    rows = [{"prompt": r["prompt"], "response": r["response"]} for r in sums(40)]
    rows[3]["response"] = ""
    write_lines(tmp_path / "a.jsonl", rows)
    status, out, _ = cads("init", "a.jsonl", "--model", "llama")
    assert status == 0
    assert written()["task"]["drop"] is True
    assert "1 left out of " in out
    assert cads("check", "cads.yaml")[0] == 0


def test_a_leak_is_said_and_the_file_is_written(cads, tmp_path):
    model_folder(tmp_path / "llama")
    rows = [{"prompt": r["prompt"], "response": r["response"]} for r in sums(40)]
    write_lines(tmp_path / "a.jsonl", rows[:30])
    write_lines(tmp_path / "b.jsonl", rows[20:])
    status, out, err = cads("init", "a.jsonl", "--target", "b.jsonl", "--model", "llama")
    assert status == 1
    assert "target: 5 of 10 examples are in the pool too" in out
    assert "cads.yaml is written, and `cads check` refuses it until this is mended: 5 of 10" in err
    assert cads("check", "cads.yaml")[0] == 1


def test_images_of_several_sizes_with_one_that_is_broken(cads, tmp_path):
    images(tmp_path / "photos", ((16, 16), (20, 12)))
    (tmp_path / "photos" / "cat" / "x.png").write_text("no image")
    status, out, _ = cads("init", "photos")
    assert status == 0
    assert "images that cannot be read: 1, such as cat/x.png" in out
    assert "2 classes" in out
    task = written()["task"]
    assert (task["model"], task["image_size"], task["drop"]) == ("cnn", 12, True)
    assert cads("train", "cads.yaml", "--progress", "false", "--train.batch_size", "4", "--out", "run")[0] == 0


@pytest.mark.parametrize("name", ["chats", "prompts", "text", "images", "grid"])
def test_templates_parse(cads, name):
    status, out, _ = cads("init", "--template", name)
    assert status == 0
    assert "Written: cads.yaml" in out
    status, _, err = cads("check", "cads.yaml")
    if name in ("images", "grid"):
        assert status == 0
        return
    # All that a template of texts lacks is the files.
    assert (status, "pool.jsonl does not exist" in err) == (1, True)


def test_a_grid_for_files(cads, tmp_path):
    images(tmp_path / "photos", n=30)
    assert cads("init", "photos", "--template", "grid")[0] == 0
    assert cads("check", "cads.yaml")[0] == 0
    status, out, _ = cads("compare", "cads.yaml", "--dry-run", "--train.batch_size", "8")
    assert status == 0
    assert "16 of 16 cells" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Give files or folders"),
        (("chat.jsonl",), "no such file or folder: did you mean chats.jsonl?"),
        (("chats.jsonl", "--template", "prompts"), "which is --template chats"),
        (("--template", "chat"), "it must be one of chats, prompts, text, images, grid or null: did you mean chats?"),
        (("--templat", "chats"), "templat is unknown: did you mean template?"),
        (("chats.jsonl", "photos"), "some paths are texts and some are folders of images"),
        (("chats.jsonl", "--target", "chats.jsonl"), "is pool and target"),
        (("chats.jsonl", "chats.jsonl"), "is the pool twice"),
        (("photos/cat/0.png",), "is a single image"),
        (("notes.txt",), "has the suffix '.txt'"),
        (("empty",), "holds nothing that can be read"),
        (("val.jsonl",), "nothing is left for the pool"),
        (("odd.jsonl",), "no format is recognised"),
        (("chats.jsonl", "--output", "chats.jsonl"), "chats.jsonl exists"),
    ],
)
def test_what_is_refused(cads, tmp_path, words, message):
    images(tmp_path / "photos", n=1)
    write_lines(tmp_path / "chats.jsonl", conversations(4))
    write_lines(tmp_path / "val.jsonl", conversations(4))
    write_lines(tmp_path / "odd.jsonl", [{"a": 1, "b": 2}])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    status, _, err = cads("init", *words)
    assert status in (1, 2)
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_help_of_check_lists_no_setting_of_a_run(cads):
    status, out, _ = cads("check", "--help")
    assert status == 0
    for idle in ("--budget", "--out ", "--options", "--checkpoint", "--track", "Settings of `cads check`"):
        assert idle not in out
    assert "--task.path" in out
    assert "--budget" in cads("plan", "--help")[1]
    assert "--track" not in cads("plan", "--help")[1]
    # The same words as those of `cads train` are taken.
    assert cads("check", "--budget", "2 epochs", "--out", "x", "--task.n_pool", "60")[0] == 0


def test_a_misspelt_command(cads):
    status, _, err = cads("chekc")
    assert status == 2
    assert "did you mean check?" in err
