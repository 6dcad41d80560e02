"""A signal is a wish, not an act: the handler notes it, and the run answers between two optimizer steps.

Whatever is done inside a handler is done in the middle of something else, a collective, a save, and on one rank before
the others: jobs hang and files are torn that way. Here a handler sets a number and returns. At the end of every
optimizer step all ranks ask each other whether anyone has noted anything, save together, and leave together.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

NOTED = (signal.SIGTERM, signal.SIGUSR1)
"""Of a preempting scheduler, and of one that announces the end of a job's time."""


class Wish:
    """The last signal that this process was sent, 0 for none. A context manager that puts old handlers back."""

    def __init__(self) -> None:
        self.noted = 0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Takes the handlers, again if somebody else has taken them meanwhile."""
        for number in NOTED:
            handler = signal.signal(number, self._note)
            self._before.setdefault(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # a process that was forked from this one has its own life
            self.noted = number

    def __enter__(self) -> Wish:
        self.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
