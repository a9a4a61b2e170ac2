"""The notebooks run from the first cell to the last, and what they show is so."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.paths import ROOT

NOTEBOOKS = ROOT / "docs" / "notebooks"


def code_cells(name: str) -> list[dict[str, object]]:
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run(name: str) -> None:
    """Run the cells in one namespace, as a kernel does."""
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(name)):
        exec(compile("".join(cell["source"]), f"{name}.ipynb, cell {number}", "exec"), namespace)


@pytest.mark.slow
def test_chats(capsys):
    run("chats")
    printed = capsys.readouterr().out
    shares = re.search(r"'editors': ([\d.]+), 'forum': ([\d.]+)", printed)
    assert float(shares[1]) > 0.8
    losses = re.search(r"test loss: ([\d.]+) nats with cads, ([\d.]+) on everything", printed)
    assert float(losses[1]) < float(losses[2]) / 2


@pytest.mark.slow
def test_images(capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    run("images")
    printed = capsys.readouterr().out
    right = dict(re.findall(r"^([\w-]+) +([\d.]+) % right$", printed, re.MULTILINE))
    assert float(right["cads"]) == max(map(float, right.values()))
    assert float(right["cads"]) > float(right["full"]) + 1
    assert int(re.search(r"(\d+) of the lowest 100", printed)[1]) > 60


@pytest.mark.parametrize("name", ["chats", "images"])
def test_outputs_are_stored(name):
    for cell in code_cells(name):
        assert cell["execution_count"], "execute the notebook and store it"
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert kinds <= {"stream", "execute_result", "display_data"}
        assert "print(" not in "".join(cell["source"]) or "stream" in kinds
        for output in cell["outputs"]:
            assert "/tmp/" not in json.dumps(output)


def test_there_are_no_others():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == ["chats", "images"]
