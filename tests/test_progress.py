"""A progress bar in a log is lines, few, and each once."""

from __future__ import annotations

import io
import sys
import time

import pytest

from dlcm_lightning import progress
from dlcm_lightning.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, file: io.StringIO, *, leave: bool) -> str:
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    with progress_bar(total=40, desc="train", unit="step", delay=0, leave=leave) as bar:
        for _ in range(40):
            time.sleep(0.005)
            bar.set_postfix({"loss": "1.5"}, refresh=False)
            bar.update()
        bar.close()
    return file.getvalue()


def test_without_a_terminal_a_bar_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, io.StringIO(), leave=True)
    lines = text.splitlines()
    assert "\r" not in text and all(line.startswith("train: ") for line in lines)
    assert 3 <= len(lines) <= 8, lines  # 0.2 s, one every 0.05 s, the first and the last
    assert len(set(lines)) == len(lines), "none twice"
    assert "100 %, 40 of 40" in lines[-1] and "loss=1.5" in lines[-1]
    assert "100 %" not in drawn(monkeypatch, io.StringIO(), leave=False)


def test_on_a_terminal_it_is_drawn_over_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, Terminal(), leave=True)
    assert "\r" in text and "40/40" in text


def test_what_takes_no_longer_than_five_seconds_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    list(progress_bar(range(10), desc="quick"))
    assert file.getvalue() == ""
