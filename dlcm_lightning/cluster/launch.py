"""The processes of one machine, for a run that nobody started with a launcher: the first starts the others.

    dlcm pretrain RUN_FILE train.devices=4        one command, four ranks

The others run the command line of the first once more, and are told where they stand by the variables that torchrun
sets too. They end with the first: each holds the reading end of a pipe that only the first can write to, and which the
kernel closes whichever way that one ends. When one of them fails, the first, which may wait for it for ever, is ended
after a while that is enough for saving.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import NoReturn

from dlcm_lightning.cluster.world import World
from dlcm_lightning.errors import FAILED, STOPPED, RunError

PIPE = "DLCM_FIRST_PROCESS"
"""Environment of the others: the number of the pipe's reading end."""
POLL_SECONDS = 0.2
GRACE_SECONDS = 30.0
"""Between the failure of one process and the end of the first by force; and for the others to leave by themselves."""
ORPHAN_SECONDS = 5.0
"""That the others live on without the first: they only wait for it."""


class OtherRanks:
    """What the first process of a node has started. A context manager; entered by every process of the run."""

    def __init__(self, world: World) -> None:
        """RunError: there is no command line that could be run once more."""
        self.processes: list[subprocess.Popen[bytes]] = []
        self._world = world
        self._pipe = -1
        self._done = threading.Event()
        if world.launcher == "dlcm" and not _can_be_run_again():
            raise RunError(f"train.devices = {world.local_size}: an interactive session cannot start processes like "
                           "itself; put the call into a file, or use `dlcm pretrain` or torchrun")

    def __enter__(self) -> OtherRanks:
        if self._world.launcher == "dlcm":
            self._start()
        elif PIPE in os.environ:
            threading.Thread(target=_leave_with_the_first, args=(int(os.environ[PIPE]),), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._done.set()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.returncode not in (0, STOPPED):
                rank = self._world.rank + 1 + self.processes.index(process)
                print(f"dlcm: rank {rank}, which this process started, ended with {process.returncode}",
                      file=sys.stderr, flush=True)
        if self._pipe >= 0:
            os.close(self._pipe)

    def _start(self) -> None:
        reading, self._pipe = os.pipe()
        command = [sys.executable, *sys.orig_argv[1:]]
        assert self._world.local_size is not None
        for local_rank in range(1, self._world.local_size):
            variables = {**os.environ, **self._world.variables(local_rank), PIPE: str(reading)}
            self.processes.append(subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL,
                                                   pass_fds=(reading,)))
        os.close(reading)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Ends this process where another has failed and this one does not notice."""
        while not self._done.wait(POLL_SECONDS):
            for process in self.processes:
                if process.poll() not in (None, 0, STOPPED):
                    if self._done.wait(GRACE_SECONDS):
                        return
                    print(f"dlcm: a rank that this process started has ended with {process.returncode}, and the "
                          "others wait for it; ended", file=sys.stderr, flush=True)
                    os._exit(FAILED)


def _can_be_run_again() -> bool:
    """Whether the command line names a program, unlike that of an interactive interpreter or a notebook."""
    return not hasattr(sys, "ps1") and "ipykernel" not in sys.modules and len(sys.orig_argv) > 1


def _leave_with_the_first(pipe: int) -> None:
    os.read(pipe, 1)  # nothing is ever written: it returns when the first process has ended
    time.sleep(ORPHAN_SECONDS)
    os._exit(FAILED)


def leave(code: int) -> NoReturn:
    """Ends this process, and does not wait until the interpreter is taken down where torch was loaded: threads of its
    collectives may ask for the interpreter meanwhile, which Python 3.11 answers with an abort of the process, now and
    then (2 of some 40 ends in one test run)."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules:
        os._exit(code)
    sys.exit(code)
