"""A signal is a wish, not an act: the handler notes it, and the run answers between two optimizer steps.

Whatever is done inside a handler is done in the middle of something else, a collective, a save, and on one rank before
the others: jobs hang and files are torn that way. Here a handler sets a number and returns. At the end of every
optimizer step all ranks ask each other whether anyone has noted anything, save together, and leave together. The first
rank also looks whether somebody has put a file there that wishes the same.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

NOTED = (signal.SIGTERM, signal.SIGUSR1)
"""Of a preempting scheduler, and of one that announces the end of a job's time."""
STACKS = signal.SIGUSR2
"""Makes a process print the stacks of its threads and go on, even where it hangs."""
FIRST_FILE = 1000
"""Files are numbered from here on, above every signal: of two wishes the larger number is told."""


class Wish:
    """The last signal that this process was sent, 0 for none. A context manager that puts old handlers back."""

    def __init__(self, *files: Path) -> None:
        """files: whose existence is a wish too; of several the last one counts."""
        self.files = files
        self._signal = 0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def noted(self, look: bool) -> int:
        """look: also for the files."""
        there = [FIRST_FILE + number for number, file in enumerate(self.files) if file.exists()] if look else []
        return max([self._signal, *there])

    def named(self, number: int) -> str:
        """In words."""
        if number >= FIRST_FILE:
            return f"{self.files[number - FIRST_FILE]} is there"
        return signal.Signals(number).name

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # a process that was forked from this one has its own life
            self._signal = number

    def __enter__(self) -> Wish:
        self._before = {number: signal.signal(number, self._note) for number in NOTED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def print_stacks_when_asked() -> None:
    """On SIGUSR2, to the standard error that the process was given."""
    faulthandler.register(STACKS, file=2, all_threads=True)
