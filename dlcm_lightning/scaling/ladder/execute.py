"""Sub-processes, one at a time: each trains one run, this one waits, watches, and passes on what it is told.

A child has a session of its own, so that Ctrl-C reaches this process alone, which asks the child to leave: it saves at
the end of its step, and the next call goes on. A second Ctrl-C ends it at once. What a child prints goes to a log; its
last line is shown where it fails. A run is held by whoever trains it (the lock of `dlcm pretrain`), so two processes
may go through one study: who comes second leaves that run alone.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

from dlcm_lightning.errors import STOPPED, USER_ERROR, RunError, Stopped
from dlcm_lightning.progress import progress_bar
from dlcm_lightning.scaling.ladder.runs import Job, reached_step, state_of

NOTED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
HELD = "is in use by a running job"
"""What `dlcm pretrain` says of a run that another process trains."""
DIVERGED = "the norm of the gradient is"
"""And of one whose gradient is no longer finite. It comes there again whenever it is continued."""
POLL_SECONDS = 0.2
LOOK_SECONDS = 2.0
"""Between two looks at how far a run is."""


@dataclass(frozen=True)
class Outcome:
    """How a job went. skipped: it was finished already. taken: another process has it."""

    job: Job
    how: Literal["finished", "skipped", "taken", "failed"]
    said: str = ""
    """The last line of the child, where it failed."""


class StopAsked:
    """The signals that this process was sent. A context manager that puts old handlers back; in a thread that is not
    the main one it hears nothing."""

    def __init__(self) -> None:
        self.number, self.interrupts = 0, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopAsked:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in NOTED if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.interrupts += number == signal.SIGINT


class Executor:
    """Goes through jobs. A context manager: signals are heard and a bar is shown inside of it."""

    def __init__(self, logs: Path) -> None:
        """logs: folder for what children print."""
        self.logs = logs
        self._stop = StopAsked()

    def __enter__(self) -> Executor:
        self._stop.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._stop.__exit__(kind, error, trace)

    def go_through(self, groups: Sequence[Sequence[Job]], what: str = "ladder") -> Iterator[Outcome]:
        """Does the jobs of each group in order; where the first of a group is not finished by that, the others, its
        branches, are left out. what: the word before the bar.

        Stopped: this process was told to leave; the run that was under way has saved itself.
        """
        unfinished = [job for group in groups for job in group if state_of(job) != "finished"]
        bar = progress_bar(total=sum(job.flops for job in unfinished), desc=what, unit="FLOP", unit_scale=True)
        counted = {job.name for job in unfinished}
        with bar:
            done = 0
            for group in groups:
                for place, job in enumerate(group):
                    if state_of(job) == "finished":
                        if job.name in counted:
                            bar.update(job.flops)  # another process has finished it since
                        yield Outcome(job, "skipped")
                        continue
                    done += 1
                    bar.set_postfix_str(f"run {done} of {len(unfinished)}, {job.name}", refresh=False)
                    outcome = self._do(job, bar)
                    yield outcome
                    if place == 0 and outcome.how != "finished":
                        break

    def diverged(self, job: Job) -> bool:
        """Whether the last attempt of a job ended because its gradient was not finite."""
        return state_of(job) != "finished" and DIVERGED in _last_line(self.logs / f"{job.name}.log")

    def _do(self, job: Job, bar: Any) -> Outcome:
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{job.name}.log"
        began = bar.n
        with log.open("a", encoding="utf-8") as output:
            offset = log.stat().st_size
            self._check_asked(job, "was not begun")
            child = subprocess.Popen([sys.executable, "-m", "dlcm_lightning", *job.arguments], stdin=subprocess.DEVNULL,
                                     stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                self._wait(child, job, bar, began)
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        last = _last_line(log, offset)
        if child.returncode == 0 and state_of(job) == "finished":
            bar.update(began + job.flops - bar.n)
            return Outcome(job, "finished")
        self._check_asked(job, "has saved itself" if child.returncode == STOPPED else "was ended")
        bar.update(began - bar.n)
        if child.returncode == USER_ERROR and HELD in last:
            return Outcome(job, "taken", last)
        return Outcome(job, "failed", f"{last or f'exit code {child.returncode}'} ({log})")

    def _wait(self, child: subprocess.Popen[bytes], job: Job, bar: Any, began: float) -> None:
        looked, told = time.monotonic(), False
        steps = job.last_step - job.first_step
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
            if self._stop.number and not told:
                child.terminate()
                told = True
            if self._stop.interrupts > 1:
                child.kill()
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                share = min(1.0, (reached_step(job) - job.first_step) / steps)
                bar.update(max(0.0, began + share * job.flops - bar.n))

    def _check_asked(self, job: Job, what: str) -> None:
        if self._stop.number:
            raise Stopped(f"{signal.Signals(self._stop.number).name}: {job.name} {what}; the same command continues")


def make_branch(job: Job) -> None:
    """The directory of a branch, without training it. RunError: it cannot be."""
    made = subprocess.run([sys.executable, "-m", "dlcm_lightning", *job.arguments, "--only-make"], check=False,
                          capture_output=True, text=True)
    if made.returncode:
        said = [line for line in made.stderr.splitlines() if line.strip()] or [f"exit code {made.returncode}"]
        raise RunError(f"{job.name}: {said[-1].removeprefix('dlcm: ')}")


def _last_line(log: Path, offset: int = 0) -> str:
    """That a child has printed after `offset`."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(offset)
        lines = file.read().decode("utf-8", "replace").split("\n")
    found = [line.strip() for line in lines if line.strip()]
    named = [line for line in found if line.startswith("dlcm: ")]
    return (named or found or [""])[-1].removeprefix("dlcm: ")
