"""What is uploaded to the hub: rows, Selection and card; private by default; nothing of this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import yaml

import cads
from cads.cli.main import main
from cads.errors import ConfigError
from cads.recipe import TrainConfig
from cads.selection import Selection
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from tests.support.selections import chosen, small_task
from tests.support.tiny_llama import model_folder, sums, write_lines


class Hub:
    """Stands in for the client of the hub: keeps what it is given."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def __call__(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return f"https://huggingface.co/datasets/{repo_id}"

    def upload_folder(self, *, folder_path, **options):
        self.calls.append(("upload", options))
        shutil.copytree(folder_path, self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    stand_in = Hub(tmp_path / "uploaded")
    monkeypatch.setattr(huggingface_hub, "HfApi", stand_in)
    return stand_in


@pytest.fixture
def texts(tmp_path):
    """A Selection of every third text of a file."""
    model = model_folder(tmp_path / "llama")
    file = tmp_path / "secret" / "sums.jsonl"
    file.parent.mkdir()
    write_lines(file, sums(60))
    config = LanguageConfig(model=str(model), pool=[TextSource(path=str(file))], n_target=8, n_test=8)
    return chosen(config.build(TrainConfig(batch_size=8)).pool, method="made|up")


def card(folder):
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def all_bytes(folder):
    return b"".join(file.read_bytes() for file in sorted(Path(folder).rglob("*")) if file.is_file())


def test_rows_selection_and_card_are_uploaded(hub, texts, tmp_path):
    count = cads.export(texts, "me/chosen-sums", to="hub", token="t")
    assert count == texts.selected.sum()
    token, create, upload = hub.calls
    assert token == ("token", "t")
    assert create == ("create", "me/chosen-sums", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert upload[1]["repo_type"] == "dataset"
    assert upload[1]["delete_patterns"] == "*"
    metadata, text = card(hub.folder)
    assert metadata["size_categories"] == ["n<1K"]
    for config in metadata["configs"]:
        assert (hub.folder / config["data_files"]).exists()
    rows = datasets.load_dataset(str(hub.folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == count
    assert sum(rows["weight"]) == pytest.approx(1)
    scores = datasets.load_dataset(str(hub.folder), "scores", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(scores) == len(texts.ids)
    assert f"{count:,} of {len(texts.ids):,} examples" in text
    assert "made\\|up" in text
    assert "| FLOPs of selection | 123 |" in text
    assert texts.pool_hash in text
    loaded = Selection.load(hub.folder / "selection")
    np.testing.assert_array_equal(loaded.selected, texts.selected)
    assert loaded.content_hash == texts.content_hash


def test_no_folder_of_this_machine_is_uploaded(hub, texts, tmp_path):
    cads.export(texts, "me/chosen", to="hub")
    assert str(tmp_path).encode() not in all_bytes(hub.folder)
    assert b"secret" not in all_bytes(hub.folder)
    assert b"sums.jsonl" in all_bytes(hub.folder)


def test_a_selection_alone_has_no_rows(hub):
    selection = chosen(small_task().pool)
    assert selection.push_to_hub("me/images", private=False).endswith("me/images")
    assert sorted(path.name for path in hub.folder.iterdir()) == ["README.md", "selection"]
    assert hub.calls[1][2]["private"] is False
    metadata, text = card(hub.folder)
    assert [config["config_name"] for config in metadata["configs"]] == ["scores"]
    assert "The rows themselves are not here." in text
    assert Selection.load(hub.folder / "selection").content_hash == selection.content_hash


def test_the_command_uploads_a_selection_whose_rows_are_in_no_files(hub, caplog, tmp_path):
    chosen(small_task().pool).save(tmp_path / "selection")
    assert main(["export", str(tmp_path / "selection"), "--to", "hub", "--output", "me/images"]) == 0
    assert "the Selection alone is uploaded" in caplog.text
    assert (hub.folder / "selection" / "scores.parquet").exists()


def test_a_trained_model_stays_here(hub):
    selection = cads.select(small_task(), "6 epochs")
    assert selection.trained is not None
    selection.push_to_hub("me/trained")
    assert not list(hub.folder.rglob("*.safetensors"))
    assert Selection.load(hub.folder / "selection").trained is None
    _, text = card(hub.folder)
    assert "different weights" in text
    assert "of each batch from the target" in text


def test_the_command_uploads(hub, texts, tmp_path, capsys):
    texts.save(tmp_path / "selection")
    words = ["export", str(tmp_path / "selection"), "--to", "hub", "--output", "me/chosen", "--private", "false"]
    assert main(words) == 0
    assert "rows: me/chosen" in capsys.readouterr().out
    assert hub.calls[1][2]["private"] is False


@pytest.mark.parametrize("name", ["chosen", "a/b/c", "./out", "me/", "me/na me"])
def test_names_that_the_hub_does_not_take_are_refused_first(hub, texts, name):
    with pytest.raises(ConfigError, match="give USER/NAME"):
        cads.export(texts, name, to="hub")
    with pytest.raises(ConfigError, match="give USER/NAME"):
        texts.push_to_hub(name)
    assert not hub.calls


def test_what_the_hub_refuses_is_said_with_the_remedy(texts, monkeypatch):
    class Refusing(Hub):
        def create_repo(self, repo_id, **options):
            raise OSError("401")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing(None))
    with pytest.raises(ConfigError, match=r"me/x could not be written \(OSError: 401\): log in by `hf auth login`"):
        texts.push_to_hub("me/x")
