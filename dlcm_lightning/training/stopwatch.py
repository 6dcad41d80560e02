"""Where the wall-clock time of training goes: steps, waiting for data, and what is neither; and the sign of life that
says in which of them this rank is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from dlcm_lightning.cluster.heartbeat import HeartbeatWriter, Phase


class Stopwatch:
    """Time of training from the end of one step to the end of the next, waiting for data included.

    What is not training (validation, checkpoints) runs inside `paused`; what is waiting for data inside `waiting`.
    """

    def __init__(self, heartbeat: HeartbeatWriter | None = None) -> None:
        self.heartbeat = heartbeat or HeartbeatWriter()
        self._mark = time.perf_counter()
        self._waited = 0.0
        self.pauses: dict[Phase, float] = {}
        """Seconds of what was not training, until somebody takes them out."""

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, pauses left out, and those among them that were spent waiting for data."""
        now = time.perf_counter()
        elapsed, waited = now - self._mark, self._waited
        self._mark, self._waited = now, 0.0
        return elapsed, waited

    @contextlib.contextmanager
    def paused(self, phase: Phase) -> Iterator[None]:
        """phase: what is done meanwhile."""
        began = time.perf_counter()
        with self._in(phase):
            yield
        seconds = time.perf_counter() - began
        self._mark += seconds
        self.pauses[phase] = self.pauses.get(phase, 0.0) + seconds

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        with self._in("data"):
            yield
        self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def _in(self, phase: Phase) -> Iterator[None]:
        before = self.heartbeat.phase
        self.heartbeat.enter(phase)
        yield
        self.heartbeat.enter(before)
