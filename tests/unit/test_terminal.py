"""The progress bar on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console
from wanvideo_infinitetalk.cli import terminal


def console(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> io.StringIO:
    shown = io.StringIO()
    made = Console(file=shown, force_terminal=is_terminal, width=120)
    monkeypatch.setattr(terminal, "console", lambda: made)
    return shown


def run(bar: terminal.ProgressBar) -> None:
    with bar:
        bar.events.stage("Loading the model")
        bar.events.reading(2**30, 3 * 2**30)
        bar._bar.refresh()
        bar.events.stage("Generating")
        bar.events.part("Encoding", 2, 7)
        bar._bar.refresh()
        for step in range(1, 5):
            bar.events.step(1, 3, step, 4)
        bar._bar.refresh()
        bar.events.window_done(2, 3)


def test_a_terminal_shows_what_happens_window_step_and_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = console(monkeypatch, is_terminal=True)
    bar = terminal.ProgressBar()
    run(bar)
    text = shown.getvalue()
    assert "Loading the model" in text
    assert "1.0 of 3.0 GiB" in text
    assert "Encoding" in text
    assert "part 2/7" in text
    assert "Generating" in text.split("part 2/7")[1]
    assert "window 2/3, step 4/4" in text
    assert ":" in text.split("step 4/4")[1]  # the remaining time stands behind


def test_a_pipe_gets_one_line_per_window(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    shown = console(monkeypatch, is_terminal=False)
    with caplog.at_level(logging.INFO):
        run(terminal.ProgressBar())
    assert shown.getvalue().strip() == ""
    assert [record.getMessage() for record in caplog.records] == ["Window 2 of 3 is in the file."]


def test_long_lines_reach_a_pipe_unbroken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    console(monkeypatch, is_terminal=False)
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "word " * 100, None, None)
    terminal.log_handler(verbose=False).emit(record)
    assert capsys.readouterr().err.rstrip("\n") == "word " * 100
