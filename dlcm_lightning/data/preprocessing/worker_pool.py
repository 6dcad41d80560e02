"""Processes that share out the tasks of a build.

The main process hands a task to whoever is idle and hears of progress; a worker reads, tokenises and writes on its
own, and says where it is before every step that takes long: should it be killed, the input in work is known. Workers
are spawned, not forked, for the tokenizer has threads; each gets its share of the cores, a few at most: threads of one
process share the vocabulary in the processor's cache, but each holds texts of its own, so that fewer workers need less
memory. A worker ends with its parent,
however that ends, so that nothing is left at work after a kill -9; and because a task is safe at every moment, workers
are ended in the same way.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from dlcm_lightning.data.preprocessing.plan import Input, Plan
from dlcm_lightning.data.preprocessing.tasks import Task
from dlcm_lightning.data.text_encoder import Encoder
from dlcm_lightning.data.webdataset_library import hide_torch
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import Log, progress_bar

REPORT_SECONDS = 0.25
"""A worker tells of its progress no more often."""
THREADS = 4
"""Of a worker, at most."""


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    plan: Plan
    working: Path
    encoder: Encoder


class Progress:
    """The bar of a build: input bytes, MB/s, time left, tokens/s. It shows if the build takes longer than 5 s."""

    def __init__(self, source: str, total_bytes: int, done_bytes: int = 0) -> None:
        self._bar = progress_bar(total=total_bytes, initial=done_bytes, desc=f"tokenise {source}", unit="B",
                                 unit_scale=True)
        self._tokens, self._began = 0, time.monotonic()

    def __call__(self, read: int, tokens: int) -> None:
        self._tokens += tokens
        if tokens:
            rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(read)

    def close(self) -> None:
        self._bar.close()


def cores() -> int:
    """Cores that this process may use; of a SLURM task that is not bound to its own, as many as it asked for."""
    mine = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(mine, int(asked)) if asked.isdecimal() and int(asked) else mine


def default_workers() -> int:
    """As many as give every core a thread."""
    return -(-cores() // THREADS)


def threads_of(workers: int) -> int:
    """Threads of each of so many workers."""
    return max(1, min(THREADS, cores() // workers))


def do_tasks(job: Job, tasks: Sequence[tuple[int, list[Input]]], workers: int, progress: Progress,
             log: Log) -> None:
    """Does the tasks, each a number and its files; what others are at is waited for last.

    DataError: of the first task that fails, or a worker was killed. Tasks that are done stay done.
    """
    worker_pool = _Crew(job, min(workers, len(tasks)))
    try:
        held = worker_pool.do(tasks, progress, wait_for_others=False)
        if held:
            log(f"data: waiting for other processes that are at {len(held)} tasks of this source")
            worker_pool.do(held, progress, wait_for_others=True)
    finally:
        worker_pool.dismiss()


class _Crew:
    """Spawned workers and a pipe to each."""

    def __init__(self, job: Job, workers: int) -> None:
        spawning = multiprocessing.get_context("spawn")
        threads = threads_of(workers)
        self._processes: dict[Connection, Any] = {}
        self._places: dict[Connection, str] = {}
        for _ in range(workers):
            mine, theirs = spawning.Pipe()
            process = spawning.Process(target=_serve, args=(theirs, job, threads), daemon=True)
            process.start()
            theirs.close()
            self._processes[mine] = process

    def do(self, tasks: Sequence[tuple[int, list[Input]]], progress: Progress, *,
           wait_for_others: bool) -> list[tuple[int, list[Input]]]:
        """Returns the tasks that other processes hold."""
        waiting, idle = deque(tasks), list(self._processes)
        busy: dict[Connection, tuple[int, list[Input]]] = {}
        held: list[tuple[int, list[Input]]] = []
        while waiting or busy:
            while waiting and idle:
                pipe, task = idle.pop(), waiting.popleft()
                busy[pipe] = task
                self._send(pipe, (*task, wait_for_others))
            for pipe in cast(list[Connection], wait(list(busy))):
                kind, content = self._receive(pipe)
                if kind == "progress":
                    progress(*content)
                elif kind == "at":
                    self._places[pipe] = content
                elif kind == "refused":
                    raise DataError(content)
                elif kind == "failed":
                    raise RuntimeError(f"a worker failed\n{content}")
                else:
                    if kind == "held":
                        held.append(busy[pipe])
                    del busy[pipe]
                    idle.append(pipe)
        return held

    def dismiss(self) -> None:
        for pipe, process in self._processes.items():
            process.kill()
            process.join()
            pipe.close()

    def _send(self, pipe: Connection, message: object) -> None:
        try:
            pipe.send(message)
        except OSError:
            self._raise_killed(pipe)

    def _receive(self, pipe: Connection) -> tuple[str, Any]:
        try:
            found: tuple[str, Any] = pipe.recv()
            return found
        except (EOFError, OSError):
            self._raise_killed(pipe)
            raise

    def _raise_killed(self, pipe: Connection) -> None:
        process = self._processes[pipe]
        process.join(5)
        place = self._places.get(pipe)
        raise DataError(f"a worker ended with exit code {process.exitcode} (-9: killed, as when memory runs out; then "
                        f"give fewer --workers){f', at or after {place}' if place else ''}; what is finished is kept, "
                        "the same command continues") from None


def _serve(pipe: Connection, job: Job, threads: int) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    hide_torch()
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # of the tokenizers library; before its first use
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")
    try:
        while True:
            number, files, wait_for_others = pipe.recv()
            meter = _Meter(pipe)
            mine = Task(job.plan, job.working, number).work(
                files, job.encoder, meter, threads=threads, wait=wait_for_others,
                at=lambda place: pipe.send(("at", place)))
            meter.flush()
            pipe.send(("done" if mine else "held", None))
    except EOFError:
        return
    except DataError as error:
        pipe.send(("refused", str(error)))
    except OSError as error:
        pipe.send(("refused", not_written(job.working, error)))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))


def not_written(folder: Path, error: OSError) -> str:
    """What to say of a disk that refuses."""
    return (f"{folder}: cannot be written ({error}); make room or mend its rights, what is finished is kept and the "
            "same command continues")


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Meter:
    """Gathers progress and tells the parent of it now and then."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._read, self._tokens, self._told = pipe, 0, 0, time.monotonic()

    def __call__(self, read: int, tokens: int) -> None:
        self._read += read
        self._tokens += tokens
        if time.monotonic() - self._told > REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._pipe.send(("progress", (self._read, self._tokens)))
        self._read, self._tokens, self._told = 0, 0, time.monotonic()
