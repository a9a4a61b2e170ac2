"""`cads glossary` explains the words of tables where no pages are at hand."""

from __future__ import annotations

import pytest

from cads.accounting.ledger import GLOSSARY
from cads.cli import glossary as module
from cads.cli.glossary import page, read_entries, terms_of
from cads.cli.main import main


def test_all_entries_fit_80_columns(capsys):
    assert main(GLOSSARY.split()[1:]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = read_entries(page().read_text("utf-8"))
    assert sum(not line.startswith("  ") for line in lines) == len(entries) > 50
    assert max(map(len, lines)) <= 80
    assert all(terms_of(entry) for entry in entries)
    assert "**" not in " ".join(lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["probe"], "probe, probe of the initial model: a few examples"),
        (["Model", "FLOP", "utilisation"], "Model FLOP utilisation: the speed"),
        (["tempered"], "Tempered loss: tempered_loss"),
    ],
)
def test_a_word_is_explained(capsys, words, said):
    assert main(["glossary", *words]) == 0
    assert said in " ".join(capsys.readouterr().out.replace("`", "").split())


def test_a_word_that_is_not_there_gets_the_nearest(capsys):
    assert main(["glossary", "utilisatoin"]) == 1
    assert main(["glossary", "prbe"]) == 1
    assert "did you mean probe?" in capsys.readouterr().err
    assert main(["glosary"]) == 2
    assert "did you mean glossary?" in capsys.readouterr().err


def test_a_page_that_is_not_installed_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "a" / "b" / "c" / "glossary.py"))
    monkeypatch.setattr(module, "files", lambda _: None)
    assert main(["glossary"]) == 1
    assert "install cads-select again" in capsys.readouterr().err
