"""Signs of attempt. A rank that hangs looks, from outside, like one that computes: it keeps its processor, or its GPU,
busy waiting for a peer. So each says, every few seconds, in which phase of which step it is and for how long.

A thread of the rank publishes what the main thread has noted. Where the whole process stands still, so does the thread,
and the number of its beat no longer changes. The job compares with its own clock only: clocks of nodes may differ. When
ranks wait for each other, all of them are silent; the one to blame is the one that has not come as far as the others.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dlcm_lightning.cluster.world import node_name
from dlcm_lightning.config import JobConfig

Phase = Literal["start", "data", "forward", "backward", "update", "validate", "save", "end", "left"]
ORDER = {phase: number for number, phase in enumerate(get_args(Phase))}
"""Of the phases of one step."""
HEARTBEATS = "heartbeat"


def limits(job: JobConfig) -> Mapping[str, float]:
    """Seconds of silence that each phase may last."""
    minutes = {"start": job.start_minutes, "data": job.data_minutes, "forward": job.step_minutes,
               "backward": job.step_minutes, "update": job.step_minutes, "validate": job.validate_minutes,
               "save": job.save_minutes, "end": job.validate_minutes, "left": math.inf}
    return {phase: 60 * value for phase, value in minutes.items()}


class HeartbeatWriter:
    """Of one rank. Without a folder it is only noted."""

    def __init__(self, folder: Path | None = None, rank: int = 0, seconds: float = 5.0) -> None:
        """seconds: between two beats."""
        self.phase: Phase = "start"
        self.step = 0
        """Optimizer steps that are done."""
        self._since = time.monotonic()
        self._rank, self._seconds, self._beat = rank, seconds, 0
        self._file = folder / f"rank-{rank:05d}" if folder is not None else None
        self._ended = threading.Event()
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._publish()
            threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Notes what the rank does from now on."""
        self.phase, self._since = phase, time.monotonic()
        if step is not None:
            self.step = step

    def end(self) -> None:
        """The rank leaves, and nobody need wait for it."""
        self.enter("left")
        self._ended.set()
        if self._file is not None:
            self._publish()

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            self._publish()

    def _publish(self) -> None:
        assert self._file is not None
        self._beat += 1
        said = {"rank": self._rank, "node": node_name(), "phase": self.phase, "step": self.step,
                "silent": time.monotonic() - self._since, "beat": self._beat}
        unfinished = self._file.with_name(f".{self._file.name}.{threading.get_ident()}")
        try:
            unfinished.write_text(json.dumps(said))
            unfinished.replace(self._file)
        except OSError:  # of a disk that is full, the save will tell
            pass


@dataclass
class RankStatus:
    """The last that was heard of a rank."""

    rank: int
    node: str = "a node that has not answered"
    phase: str = "start"
    step: int = 0
    silent: float = 0.0
    beat: int = 0
    at: float = 0.0
    """When, by the listener's clock."""

    def silence(self, now: float) -> float:
        """Seconds in its phase."""
        return self.silent + now - self.at


class HangDetector:
    """The job's side: reads what the ranks publish."""

    def __init__(self, folder: Path, ranks: int, job: JobConfig, now: float) -> None:
        self.folder, self.limits, self.patience = folder, limits(job), 3 * job.heartbeat_seconds
        self.heard = [RankStatus(rank, at=now) for rank in range(ranks)]

    def listen(self, now: float) -> None:
        """Reads all. now: of a monotonic clock."""
        for rank, before in enumerate(self.heard):
            try:
                said = json.loads((self.folder / f"rank-{rank:05d}").read_bytes())
            except (FileNotFoundError, ValueError, OSError):
                continue
            if said["beat"] != before.beat:
                self.heard[rank] = RankStatus(**said, at=now)

    def hung(self, now: float) -> RankStatus | None:
        """The rank to blame, where one has been silent for longer than its phase may last; of several, the one whose
        process stands still altogether, then the one that is furthest behind."""
        silent = [one for one in self.heard if one.silence(now) > self.limits[one.phase]]
        if not silent:
            return None

        present = [one for one in self.heard if one.phase != "left"]

        def behind(one: RankStatus) -> tuple[bool, int, int, float]:
            still = one.beat > 0 and now - one.at > self.patience
            return (not still, one.step, ORDER[one.phase], -one.silence(now))

        return min(present, key=behind)

    def as_far_as(self, one: RankStatus) -> int:
        """Other ranks that stand where this one stands: from outside they look the same."""
        return sum((other.step, other.phase) == (one.step, one.phase) for other in self.heard) - 1
