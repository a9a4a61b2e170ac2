"""Progress where there is no terminal: lines that say what is under way, also while one piece of work takes long."""

import io
import time

import pytest
from rich.console import Console

from cads.monitor import Monitor
from cads.runtime import progress
from cads.runtime.progress import StageProgress


def console():
    return Console(file=io.StringIO(), width=80)


def test_a_line_says_what_it_is_doing_the_share_done_and_what_is_left():
    shown = StageProgress(console())
    stage = shown.begin("final model", 2e12, "FLOPs")
    shown.advance(stage, 5e11, "loss 0.532")
    (line,) = shown.lines()
    for words in ("final model", "25% done", "1.5e+12 of its 2e+12 FLOPs left", "loss 0.532"):
        assert words in line
    counted = shown.begin("choices", 1319, "examples")
    shown.advance(counted, 319)
    assert "1,000 of 1,319 examples left" in shown.lines()[1]
    shown.begin("test", None, "examples")
    assert shown.lines()[2].endswith("test, under way")
    for left in (stage, counted):
        shown.end(left)
    assert len(shown.lines()) == 1


def test_the_time_that_is_left_follows_from_the_speed(monkeypatch):
    clock = [0.0]
    shown = StageProgress(console())
    shown.bar.get_time = lambda: clock[0]
    stage = shown.begin("final model", 100.0, "FLOPs")
    for second in range(1, 21):
        clock[0] = float(second)
        monkeypatch.setattr(shown, "_drawn", 0.0)
        shown.advance(stage, float(second))
    assert "about 1.33 min left" in shown.lines()[0], "80 of 100 are left, at one a second"


def test_lines_come_also_while_nothing_advances(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    place = console()
    shown = StageProgress(place, 0.02)
    shown.start()
    shown.begin("one long step", 1e9, "FLOPs")
    ended = time.monotonic() + 5
    while "one long step" not in place.file.getvalue() and time.monotonic() < ended:
        time.sleep(0.01)
    shown.stop()
    text = place.file.getvalue()
    assert "one long step, 0% done" in text
    time.sleep(0.1)
    assert place.file.getvalue() == text, "a stopped display prints nothing more"


def test_a_quick_run_prints_no_line():
    place = console()
    with Monitor(console=place) as monitor, monitor.progress("final model", 1e6) as advance:
        advance(1e6, 0.5, 0.1)
    assert place.file.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_terminals_alone(terminal):
    shown = StageProgress(Console(file=io.StringIO(), force_terminal=terminal))
    assert shown.bar.disable is not terminal
