"""Where the wall-clock time of training goes: steps, waiting for data, and what is neither."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Time of training from the end of one step to the end of the next, waiting for data included.

    What is not training (validation, checkpoints) runs inside `paused`; what is waiting for data inside `waiting`.
    """

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._waited = 0.0

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, pauses left out, and those among them that were spent waiting for data."""
        now = time.perf_counter()
        elapsed, waited = now - self._mark, self._waited
        self._mark, self._waited = now, 0.0
        return elapsed, waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._mark += time.perf_counter() - began

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
