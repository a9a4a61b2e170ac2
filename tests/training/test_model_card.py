"""The model card says data, budget, selection and metrics, and its head can be read."""

import json

import pytest
import yaml

from cads.cli.main import main
from cads.training.model_card import CARD, model_card, write_card

CONFIG = """
task:
  hidden: 16
  n_pool: 80
  n_target: 40
  n_test: 40
  sources: [{name: "clean | <b>"}, {name: "[x](http://y)", label_noise: 0.9}]
train: {batch_size: 8}
budget: 8 epochs
"""


def test_a_training_writes_a_card(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert main(["train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run"), "--track", "null"]) == 0
    text = (tmp_path / "run" / CARD).read_text()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    head = yaml.safe_load(text.split("---")[1])
    assert head["tags"] == ["cads", "data-selection"]
    for title in ("## Data", "## Budget", "## Selection", "## Metrics"):
        assert title in text
    assert "(8 epochs), for selection and training" in text
    assert f"| accuracy | {results['metrics']['accuracy']:.6g} |" in text
    assert f"| pool | 80 | {results['data']['pool']['hash'][:16]} |" in text
    assert "80 of 80 examples of the pool" in text
    assert "clean \\| \\<b\\>" in text
    assert "<b>" not in text
    assert "[x](" not in text


def card_of(**changes):
    part = {"examples": 10, "hash": "ab" * 32}
    results = {
        "data": {"task": "t", "base_model": None, "pool": part, "target": part, "test": part},
        "budget": {"given": "1e9 FLOPs", "flops": 1e9, "covers_selection": False, "seed": 0},
        "selection": {
            "method": "search",
            "seed": 3,
            "examples": 10,
            "selected": 5,
            "target_fraction": 0.25,
            "shares": {f"s{i}": 1 / 40 for i in range(40)},
            "notes": {"guard": "the full pool was not beaten"},
        },
        "ledger": [],
        "metrics": {"loss": 0.5},
        "steps": 7,
    }
    results.update(changes)
    return results


def test_what_is_not_the_rule_is_said(tmp_path):
    text = model_card("m", card_of(), "peft")
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "peft"
    assert "training; selection comes on top" in text
    assert "25% of each batch is drawn from the target" in text
    assert "the full pool was not beaten." in text
    assert "10 more sources have smaller shares." in text


@pytest.mark.parametrize(("base", "in_head"), [("org/model", True), (None, False)])
def test_the_base_model(base, in_head):
    results = card_of()
    results["data"]["base_model"] = base
    head = yaml.safe_load(model_card("m", results).split("---")[1])
    assert ("base_model" in head) is in_head


def test_a_base_model_in_a_folder_is_no_model_of_the_hub(tmp_path):
    results = card_of()
    results["data"]["base_model"] = str(tmp_path)
    text = model_card("m", results)
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert str(tmp_path.parent) not in text
    assert f"It starts from {tmp_path.name}." in text


def test_results_of_earlier_versions_get_no_card(tmp_path):
    write_card(tmp_path, {"metrics": {}, "ledger": []})
    assert not list(tmp_path.iterdir())
