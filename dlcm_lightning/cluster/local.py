"""The ranks of one run as processes of this machine, for proofs and tests: started together, ended together.

Every rank is told where it stands by the environment that torchrun gives too. When one ends by itself with an error,
the others, which may wait for it for ever, are ended; whatever happens, none is left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from dlcm_lightning.cluster.world import World, free_port

POLL_SECONDS = 0.02
GRACE_SECONDS = 20.0
"""Between the end of one rank by an error and the end of the others by force."""


class LocalRanks:
    """Processes 0 to count - 1. A context manager, which kills those that still run when it is left."""

    def __init__(self, command: Sequence[str], count: int, logs: Path, *, threads: int = 1,
                 variables: dict[str, str] | None = None) -> None:
        """logs: a folder for the output of every rank, rank-N.log, appended to. threads: of the arithmetic of each.
        variables: more of the environment."""
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank-{rank}.log" for rank in range(count)]
        world = World("dlcm", 0, count, 0, count, 0, port=free_port())
        self.command = " ".join(command)
        self.processes: list[subprocess.Popen[bytes]] = []
        outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        for rank, log in enumerate(self.logs):
            place = {**world.variables(rank), "OMP_NUM_THREADS": str(threads)}
            with log.open("ab") as output:
                self.processes.append(subprocess.Popen(
                    list(command), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    env={**outside, **place, **(variables or {})}, start_new_session=True))

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self.kill()

    def send(self, number: int, rank: int | None = None) -> None:
        """A signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """Every rank and what it has started."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self.processes:
            process.wait()

    @property
    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def wait(self, seconds: float) -> list[int]:
        """Exit codes, when all have ended; -9 for those that had to be killed after another's error.
        TimeoutError: not within so many seconds; all are killed."""
        deadline = time.monotonic() + seconds
        failed: float | None = None
        while self.running:
            now = time.monotonic()
            if failed is None and any(process.poll() not in (None, 0) for process in self.processes):
                failed = now
            if failed is not None and now > failed + GRACE_SECONDS:
                break
            if now > deadline:
                self.kill()
                raise TimeoutError(f"{self.command}: not done after {seconds:g} s; see {self.logs[0]}")
            time.sleep(POLL_SECONDS)
        self.kill()
        return [process.returncode for process in self.processes]

    def tail(self, characters: int = 3000) -> str:
        """The end of every log, for an error message."""
        return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-characters:]}" for log in self.logs)
