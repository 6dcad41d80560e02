"""Work that is shared by ranks and survives them: batches go round, answers are kept as they come.

Every rank plans the same batches and computes its share of them; what each has found, all are given in the end. An
answer is a line of a file of its rank, written when its batch is done. Whoever is started again, on as many ranks or on
others, reads what is there and computes the batches that lack an answer: each as a whole, so that its numbers are those
of an evaluation that nobody interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dlcm_lightning.cluster.world import world_of
from dlcm_lightning.config import TrainConfig
from dlcm_lightning.errors import DataError, RunError
from dlcm_lightning.ops.collectives import rank, world_size
from dlcm_lightning.ops.device import gpu_of, on_gpu
from dlcm_lightning.progress import progress_bar

MEETING = timedelta(minutes=10)
"""For ranks to find each other."""
LONGEST_WAIT = timedelta(days=2)
"""Of a rank for those that have more to do."""
Arguments = tuple[Any, ...]
T = TypeVar("T")


@contextmanager
def joined() -> Iterator[tuple[torch.device, dist.ProcessGroup | None]]:
    """Where this process computes, and all that a launcher has started, who may wait long for each other; None for one
    alone. ConfigError: they contradict each other, or there are more of them than GPUs."""
    world = world_of(TrainConfig())
    where = torch.device("cpu")
    if on_gpu():
        where = gpu_of(world.local_rank, world.local_size, world.here)
        torch.cuda.set_device(where)
    if world.size == 1:
        yield where, None
        return
    os.environ |= {"MASTER_ADDR": world.address, "MASTER_PORT": str(world.port), "RANK": str(world.rank),
                   "WORLD_SIZE": str(world.size)}  # torchrun has a store of its own there, which env:// knows of
    dist.init_process_group("gloo", timeout=MEETING)
    try:
        yield where, dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    finally:
        dist.destroy_process_group()


class Answers:
    """What has been answered, in memory and in a folder."""

    def __init__(self, folder: Path, group: dist.ProcessGroup | None) -> None:
        """folder: of one question to one model; made where it is not there. RunError: it cannot be written."""
        self._folder, self._group = folder, group
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{folder}: cannot be written ({error}); give another --out") from error

    def of(self, kind: str, arguments: Sequence[Arguments], plan: Callable[[list[Arguments]], list[list[int]]],
           compute: Callable[[list[Arguments]], list[Any]]) -> list[Any]:
        """Answers to `arguments`, plain values, in their order; equal ones are asked once. plan: batches of them, by
        number; compute: the answers of a batch. Called by all ranks with the same. DataError: they have other questions
        than each other. RunError: another rank has failed."""
        keys = [_key(kind, one) for one in arguments]
        asked = dict(zip(keys, arguments, strict=True))
        self._check_same(keys)
        unique, known = list(asked), self._read()
        batches = [[unique[number] for number in batch] for batch in plan(list(asked.values()))]
        due = [batch for batch in batches if any(key not in known for key in batch)]
        mine = due[rank()::world_size()]
        found: dict[str, Any] = {}
        failed: Exception | None = None
        done = sum(len(batch) for batch in batches) - sum(len(batch) for batch in due)
        with progress_bar(total=len(unique), desc=kind, unit="request", disable=rank() > 0) as bar:
            bar.update(done)
            try:
                for batch in mine:
                    answers = dict(zip(batch, compute([asked[key] for key in batch]), strict=True))
                    self._keep(answers)
                    found |= answers
                    bar.update(min(len(batch) * world_size(), bar.total - bar.n))
            except Exception as error:  # the others hear of it, and do not wait
                failed = error
        gathered = self._gathered((found, None if failed is None else f"{type(failed).__name__}: {failed}"))
        if failed is not None:
            raise failed
        for number, (others, said) in enumerate(gathered):
            if said is not None:
                raise RunError(f"rank {number} has failed ({said}); start again, what is answered is not asked twice")
            known |= others
        return [known[key] for key in keys]

    def _check_same(self, keys: list[str]) -> None:
        digest = hashlib.sha256("".join(keys).encode()).hexdigest()
        if len(set(self._gathered(digest))) > 1:
            raise DataError("ranks have other questions than each other; give --data-dir a folder that all nodes "
                            "share, and all nodes the same version of lm-eval")

    def _read(self) -> dict[str, Any]:
        """What rank 0 finds, on all ranks: files may grow meanwhile."""
        known: dict[str, Any] = {}
        if rank() == 0:
            for file in sorted(self._folder.glob("*.jsonl")):
                for line in file.read_bytes().splitlines():
                    try:
                        known |= json.loads(line)
                    except ValueError:
                        continue  # cut when its process was killed
        if world_size() > 1:
            box = [known]
            dist.broadcast_object_list(box, 0, group=self._group)
            known = box[0]
        return known

    def _keep(self, answers: dict[str, Any]) -> None:
        line = json.dumps(answers).encode() + b"\n"
        try:
            with (self._folder / f"rank-{rank():05d}.jsonl").open("a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read() == b"\n" else b"\n" + line  # after one that was cut
                file.write(line)
        except OSError as error:
            raise RunError(f"{self._folder}: an answer cannot be kept ({error}); free space and start again, what is "
                           "there is not computed twice") from error

    def _gathered(self, mine: T) -> list[T]:
        """Of every rank."""
        if world_size() == 1:
            return [mine]
        everyone: list[Any] = [None] * world_size()
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone


def _key(kind: str, arguments: Arguments) -> str:
    return hashlib.sha256(json.dumps([kind, *arguments]).encode()).hexdigest()[:32]
