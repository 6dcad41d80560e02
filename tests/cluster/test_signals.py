"""What a signal does to a process, also where it waits inside a library and reaches no next line of Python."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlcm_lightning.cluster.signals import FIRST_FILE, StopRequest

SECONDS = 20.0
PROGRAM = """
import ctypes, sys, time
from dlcm_lightning.cluster.signals import StopRequest
with StopRequest() as stop:
    stop.phase = sys.argv[1]
    print("ready", flush=True)
    if sys.argv[2] == "library":
        lock, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        library.pthread_mutex_lock(lock)
        library.pthread_mutex_lock(lock)  # for ever, and no signal interrupts it
    for _ in range(600):
        time.sleep(0.02)
        print(end="x", flush=True)
        if number := stop.requested(look=False):
            sys.exit(100 + number)
"""


class Child:
    """The program above as a process."""

    def __init__(self, phase: str, where: str, *before: str) -> None:
        self.process = subprocess.Popen([*before, sys.executable, "-c", PROGRAM, phase, where], text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdout is not None and self.process.stdout.read(5) == "ready"

    def ends(self, *numbers: int) -> tuple[int, str]:
        """After signals: exit code, standard error."""
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(0.1)
        try:
            _, said = self.process.communicate(timeout=SECONDS)
        finally:
            self.process.kill()
        return self.process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(("phase", "said"), [("starting", "nothing was done"), ("closing", "the run is saved")])
def test_where_nothing_would_be_lost_a_signal_ends_a_process_even_inside_a_library(
        number: signal.Signals, phase: str, said: str) -> None:
    code, error = Child(phase, "library").ends(number)
    assert code == 128 + number
    assert number.name in error and said in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_while_training_a_signal_is_noted_and_the_process_leaves_when_it_can(number: signal.Signals) -> None:
    code, error = Child("training", "python").ends(number)
    assert code == 100 + number
    assert ("Ctrl-C again" in error) == (number == signal.SIGINT)


def test_a_second_interrupt_ends_it_at_once_even_inside_a_library() -> None:
    code, error = Child("training", "library").ends(signal.SIGINT, signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert "ended without saving" in error


def test_a_process_that_was_started_to_ignore_hangups_goes_on_ignoring_them() -> None:
    assert Child("training", "python", "nohup").ends(signal.SIGHUP, signal.SIGTERM)[0] == 100 + signal.SIGTERM


def test_a_terminal_that_is_gone_does_not_keep_a_process_from_leaving_in_order() -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM, "training", "python"])
    shown = b""
    while b"x" not in shown:
        assert select.select([terminal], [], [], SECONDS)[0]
        shown += os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 100 + signal.SIGHUP


def test_of_a_forked_process_nothing_is_heard() -> None:
    with StopRequest() as stop:
        stop.phase = "training"
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        time.sleep(0.1)
        assert stop.requested(look=False) == 0


def test_a_file_is_a_request_too_and_old_handlers_come_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(tmp_path / "NOTICE", tmp_path / "STOP") as stop:
        assert stop.requested(look=True) == 0
        (tmp_path / "STOP").touch()
        assert stop.requested(look=False) == 0 and stop.requested(look=True) == FIRST_FILE + 1
        assert stop.named(FIRST_FILE + 1) == f"{tmp_path / 'STOP'} is there"
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1
