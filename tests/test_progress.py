"""A progress bar in a log is lines, few, and each once."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import TMonitor, tqdm

from dlcm_lightning.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def drawn(monkeypatch: pytest.MonkeyPatch, file: io.StringIO, *, leave: bool) -> str:
    """Of forty steps of a second each."""
    clock = Clock()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr("tqdm.std.time", clock)
    with progress_bar(total=40, desc="train", unit="step", delay=0, leave=leave) as bar:
        for _ in range(40):
            clock.now += 1
            bar.set_postfix({"loss": "1.5"}, refresh=False)
            bar.update()
        bar.close()
    return file.getvalue()


def test_without_a_terminal_a_bar_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, io.StringIO(), leave=True)
    lines = text.splitlines()
    assert "\r" not in text and all(line.startswith("train: ") for line in lines)
    assert [line.split(", ")[0].split(":")[1].split() for line in lines] == [
        ["0", "%"], ["38", "%"], ["75", "%"], ["100", "%"]], "one every 15 s, the first and the last"
    assert "100 %, 40 of 40" in lines[-1] and "loss=1.5" in lines[-1]
    assert "100 %" not in drawn(monkeypatch, io.StringIO(), leave=False)


def test_a_step_that_takes_long_is_not_told_of_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Clock(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr("tqdm.std.time", clock)
    with progress_bar(total=100, desc="train", unit="step", delay=0) as bar:
        for seconds in [1] * 29 + [17, 1, 1, 1]:
            clock.now += seconds
            watch_once(bar, clock)
            bar.update()
    assert [line.split(", ")[1] for line in file.getvalue().splitlines()] == ["0 of 100", "15 of 100", "30 of 100"]


def watch_once(bar: tqdm[Any], clock: Clock) -> None:
    """What tqdm's thread does every ten seconds, once."""
    killed = SimpleNamespace(wait=lambda _: None, is_set=iter([False, False, True]).__next__)
    TMonitor.run(SimpleNamespace(  # type: ignore[arg-type]
        _time=clock, was_killed=killed, sleep_interval=0, tqdm_cls=type(bar), get_instances=lambda: [bar]))


def test_on_a_terminal_it_is_drawn_over_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, Terminal(), leave=True)
    assert "\r" in text and "40/40" in text


def test_what_takes_no_longer_than_five_seconds_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    list(progress_bar(range(10), desc="quick"))
    assert file.getvalue() == ""


def test_a_bar_inside_another_one_moves_no_cursor_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Clock(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr("tqdm.std.time", clock)
    with progress_bar(total=3, desc="train", delay=0, leave=True) as outer:
        for _ in range(3):
            with progress_bar(total=40, desc="validate", delay=0) as inner:
                for _ in range(40):
                    clock.now += 1
                    inner.update()
            outer.update()
    assert "\x1b" not in file.getvalue()
    assert all(line.startswith(("train: ", "validate: ")) for line in file.getvalue().splitlines())
