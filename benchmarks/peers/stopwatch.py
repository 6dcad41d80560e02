"""One measurement of one loader, in a process of its own: what every row of `benchmarks.loader` was measured by.

The process is told what to do by a `Task` in JSON on its command line, is handed a function that opens a loader, and
prints its result as the last line of its output. It needs the standard library and torch only, so that the very same
code runs in the environments of the peers, which know nothing of this project.

A *loader* here is what a training loop would iterate over, wrapped to give int64 tensors (rows, sequence_length), and a
function that returns its state for a checkpoint. Three things are measured:

speed     After `warmup` batches, wall time and CPU time of the next `batches` (or as many as fit into `seconds`).
          CPU time is user + system of this process and all its descendants, so a core that a loader process keeps
          busy is counted; tokens per CPU second are what one core gives, whatever runs in parallel.
          Then the memory: Pss of this process and its descendants, without pages of mapped files, minus the same
          before the loader was opened (libraries imported, torch used once). Pss shares what several processes map
          among them, so its sum is what the machine lost. Mapped file pages are the page cache's, dropped by the
          kernel at will, and reported apart.
save      Reads to each of `positions` (batches), takes the state there and a digest of the batch that follows.
resume    From constructing the datasets to holding the first batch, and whether it is the batch that follows.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Task:
    """What one process is to do."""

    loader: str
    action: str
    """write, speed, save or resume."""
    corpus: str
    """Folder of the token streams and of every loader's own format."""
    sources: dict[str, float]
    """Names and weights."""
    sequence_length: int
    rows: int
    """Rows of a batch."""
    workers: int
    epoch: int
    """Batches of an epoch."""
    warmup: int = 0
    batches: int = 0
    seconds: float = 0.0
    positions: tuple[int, ...] = ()
    """Batches consumed where a state is saved; resume: the one to resume at."""

    @staticmethod
    def parse(text: str) -> Task:
        found = json.loads(text)
        return Task(**{**found, "positions": tuple(found["positions"])})

    def state_file(self, position: int) -> Path:
        name = f"{self.loader}-{self.sequence_length}-{self.rows}-{self.workers}-{position}.state"
        return Path(self.corpus) / "states" / name


@dataclass(frozen=True)
class Opened:
    """A loader, about to give its first batch."""

    batches: Iterator[Tensor]
    """(rows, sequence_length) int64."""
    state: Callable[[], Any]
    """What a checkpoint would hold after the batches given so far."""


Open = Callable[[Task, Any], Opened]
"""(task, state or None). The state is what `Opened.state` gave, or the number of batches where that was None."""


def descendants() -> list[int]:
    """Processes below this one."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry))
    found, open_ends = [], [os.getpid()]
    while open_ends:
        children = parents.get(open_ends.pop(), [])
        found += children
        open_ends += children
    return found


def cpu_seconds(processes: list[int]) -> float:
    """User and system time of this process (with children that have ended) and of the given ones."""
    mine = os.times()
    total = time.process_time() + mine.children_user + mine.children_system
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def machine_seconds() -> float:
    """CPU time that all processes of this machine used, and that its host took away, since it started."""
    user, nice, system, _, _, hard, soft, stolen = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + hard + soft + stolen) / TICKS


def memory(processes: list[int]) -> dict[str, int]:
    """Bytes of Pss over the processes: `held` (private and shared memory) and `mapped` (pages of files)."""
    total = {"held": 0, "mapped": 0}
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("Pss_Anon", "Pss_Shmem"):
                total["held"] += 1024 * int(rest.split()[0])
            elif name == "Pss_File":
                total["mapped"] += 1024 * int(rest.split()[0])
    return total


def digest(batch: Tensor) -> str:
    return hashlib.sha256(batch.numpy().tobytes()).hexdigest()


def speed(task: Task, open_loader: Open) -> dict[str, Any]:
    before = memory([os.getpid()])
    opened = open_loader(task, None)
    for _ in range(task.warmup):
        batch = next(opened.batches)
    processes = descendants()
    everything, cpu, began, count = machine_seconds(), cpu_seconds(processes), time.perf_counter(), 0
    while count < task.batches and (count % 8 or time.perf_counter() - began < task.seconds):
        batch = next(opened.batches)
        count += 1
    seconds = time.perf_counter() - began
    cpu = cpu_seconds(processes) - cpu
    others = machine_seconds() - everything - cpu
    after = memory([os.getpid(), *processes])
    if batch.shape != (task.rows, task.sequence_length) or batch.dtype != torch.int64:
        raise ValueError(f"a batch of {tuple(batch.shape)}, {batch.dtype}")
    tokens = count * task.rows * task.sequence_length
    return {"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu, "others_cpu_seconds": others,
            "processes": 1 + len(processes),
            "held_bytes": after["held"] - before["held"], "mapped_bytes": after["mapped"] - before["mapped"]}


def save(task: Task, open_loader: Open) -> dict[str, Any]:
    opened, consumed = open_loader(task, None), 0
    for position in task.positions:
        for _ in range(position - consumed):
            next(opened.batches)
        state = opened.state()
        following = digest(next(opened.batches))
        consumed = position + 1
        file = task.state_file(position)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pickle.dumps({"state": position if state is None else state, "digest": following}))
    return {}


def resume(task: Task, open_loader: Open) -> dict[str, Any]:
    saved = pickle.loads(task.state_file(task.positions[0]).read_bytes())
    began = time.perf_counter()
    batch = next(open_loader(task, saved["state"]).batches)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "same_batch": digest(batch) == saved["digest"]}


def run(text: str, write: Callable[[Task], None] | None, loaders: dict[str, Open]) -> None:
    """Does the task, prints its result and ends the process."""
    task = Task.parse(text)
    torch.set_num_threads(1)  # rows are copied, not computed with; idle threads spinning would count as CPU time
    torch.utils.data.default_collate([torch.zeros(2), torch.zeros(2)])
    if task.action == "write" and write is not None:
        write(task)
        print("{}")
        return
    result = {"speed": speed, "save": save, "resume": resume}[task.action](task, loaders[task.loader])
    print(json.dumps(result), flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(0)  # no farewell: reading threads would be waited for
