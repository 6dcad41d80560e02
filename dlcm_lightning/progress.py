"""What a command says while it works: lines, and progress bars (on a terminal a bar, in a log a plain line every
quarter of a minute).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from tqdm import tqdm

Log = Callable[[str], None]
"""Where lines for people go, such as print."""

SECONDS_ON_TERMINAL, SECONDS_BETWEEN_LINES = 0.5, 15.0
DELAY_SECONDS = 5.0
"""What takes no longer shows nothing."""
LINE = "{desc}: {percentage:3.0f} %, {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left, {rate_fmt}{postfix}"


class _Lines:
    """A file that a bar can be drawn on, and that holds each state of it as a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if text.strip("\r\n "):
            self._file.write(text.strip("\r\n ") + "\n")

    def flush(self) -> None:
        self._file.flush()


def progress_bar(iterable: Iterable[Any] | None = None, *, delay: float = DELAY_SECONDS, leave: bool = False,
                 **options: Any) -> tqdm[Any]:
    """tqdm with its options (total, desc, unit, unit_scale, initial, disable, ...). leave: its last state stays."""
    if sys.stderr.isatty():
        return tqdm(iterable, delay=delay, leave=leave, mininterval=SECONDS_ON_TERMINAL, dynamic_ncols=True, **options)
    # position: a bar inside another one moves no cursor. miniters: the time is asked at every update; tqdm's guess of
    # how many fit between two lines makes two of one.
    return tqdm(iterable, delay=delay, leave=leave, mininterval=SECONDS_BETWEEN_LINES, miniters=1, position=0,
                bar_format=LINE, file=_Lines(sys.stderr), ascii=True, **options)
