"""What a run does when it is told to leave: it saves first, where there is something to save.

    before the first step, and after the last     the process ends at once: nothing would be lost
    while it trains                               the signal is noted; at the end of the step all ranks agree, save and
                                                  leave. A second Ctrl-C ends the process at once

Whatever is done inside a handler is done in the middle of something else, a collective, a save, and on one rank before
the others: jobs hang and files are torn that way. So Python's handler only notes a number. But it runs between two
lines of Python, and a process that waits for a peer inside a library reaches no next line. What has to happen at once
is therefore done by a thread that the interpreter tells of every signal as it comes (signal.set_wakeup_fd).

A signal that the process was started to ignore (nohup, a job in the background) stays ignored.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

NOTED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
"""Of a preempting scheduler, of a terminal that is gone, of Ctrl-C, of a job whose time is nearly over."""
STACKS = signal.SIGUSR2
"""Makes a process print the stacks of its threads and go on, even where it hangs."""
FIRST_FILE = 1000
"""Files are numbered from here on, above every signal: of two requests the larger number is told."""
Phase = Literal["starting", "training", "closing"]


class StopRequest:
    """The last signal that this process was sent, 0 for none. A context manager that puts old handlers back."""

    def __init__(self, *files: Path, speaks: bool = True) -> None:
        """files: whose existence is a request too; of several the last one counts. speaks: whether this process tells
        the user that the run will leave."""
        self.files, self._speaks = files, speaks
        self.phase: Phase = "starting"
        """What a signal means now."""
        self._signal, self._interrupts = 0, 0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        self._terminals = [stream for stream in (0, 1, 2) if os.isatty(stream)]
        self._told, self._tell = socket.socketpair()
        self._wakeup = -1

    def requested(self, look: bool) -> int:
        """look: also for the files."""
        there = [FIRST_FILE + number for number, file in enumerate(self.files) if file.exists()] if look else []
        return max([self._signal, *there])

    def named(self, number: int) -> str:
        """In words."""
        if number >= FIRST_FILE:
            return f"{self.files[number - FIRST_FILE]} is there"
        return signal.Signals(number).name

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are the main thread's; the files are still looked at
        heard = [number for number in NOTED if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        self._tell.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        self._tell.close()  # which ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # a process that was forked from this one has its own attempt
            self._signal = number

    def _forget(self) -> None:
        """In a forked process, whose signals are not this one's."""
        if self._before:
            signal.set_wakeup_fd(-1)

    def _listen(self) -> None:
        while numbers := self._told.recv(64):
            for number in numbers:
                if number in NOTED:
                    self._answer(number)

    def _answer(self, number: int) -> None:
        """On the thread, as soon as the signal is there."""
        if number == signal.SIGHUP:
            self._silence_terminals()
        self._interrupts += number == signal.SIGINT
        name = signal.Signals(number).name
        if self.phase == "starting":
            _end(number, f"{name} before the first step: nothing was done; the same command starts again")
        if self.phase == "closing":
            _end(number, f"{name} after the last step: the run is saved; the same command makes its report")
        if self._interrupts > 1:
            _end(number, "interrupted twice: ended without saving; the same command goes on from the last checkpoint")
        if number == signal.SIGINT and self._speaks:
            _say("interrupted: the run saves at the end of this step and leaves; Ctrl-C again ends it at once")


    def _silence_terminals(self) -> None:
        """Writing to a terminal that is gone fails, and would end the run before it has saved."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in self._terminals:
            if not os.isatty(stream):
                os.dup2(nowhere, stream)
        os.close(nowhere)


def _end(number: int, said: str) -> None:
    _say(said)
    os._exit(128 + number)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be there to read it
        os.write(2, f"\ndlcm: {line}\n".encode())


def print_stacks_when_asked() -> None:
    """On SIGUSR2, to the standard error that the process was given."""
    faulthandler.register(STACKS, file=2, all_threads=True)
