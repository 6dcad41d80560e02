"""The micro-batches of one rank, in order, read in this process or in loader processes.

Several small steps are read at once. With loader processes an item crosses a pipe as numpy arrays and becomes batches
here. Those processes ignore signals, which are for the parent to answer, and so must be told when it leaves: they end
with the iteration they serve, at the latest at the end of the program, whoever still holds that iteration then.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from dlcm_lightning.batch import Batch
from dlcm_lightning.data.packing import Rows, batches
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.errors import DataError

LEAVE_SECONDS = 5.0
READ_TOKENS = 2**18
"""Small steps are read, and handed over by loader processes, so many tokens at once."""


@dataclass(frozen=True)
class _Item:
    """What is read at once, and handed over at once by a loader process."""

    rows: Rows | None
    steps: int
    error: DataError | None = None
    """Of the step after these."""


class _Items(torch.utils.data.Dataset[_Item]):
    """What one rank reads for the steps [first, last), `together` of them an item."""

    def __init__(self, reader: Reader, rank: int, world: int, first: int, last: int, together: int) -> None:
        self.reader, self.rank, self.world = reader, rank, world
        self.first, self.last, self.together = first, last, together

    def __len__(self) -> int:
        return -(-max(0, self.last - self.first) // self.together)

    def __getitem__(self, index: int) -> _Item:
        begin = self.first + index * self.together
        end = min(begin + self.together, self.last)
        if ahead := self.reader.config.read_ahead_steps:
            worker = get_worker_info()
            next_item = begin + self.together * (worker.num_workers if worker else 1)
            for later in range(next_item, min(next_item + max(ahead, self.together), self.last)):
                self.reader.prefetch(later, self.rank, self.world)
        try:
            return _Item(self.reader.read_steps(begin, end, self.rank, self.world), end - begin)
        except DataError as error:
            return self._up_to_the_error(begin, end, error)

    def _up_to_the_error(self, begin: int, end: int, error: DataError) -> _Item:
        """The steps before the one that cannot be read: nothing is lost to reading several at once."""
        good = begin
        for step in range(begin, end):
            try:
                self.reader.read_steps(step, step + 1, self.rank, self.world)
                good = step + 1
            except DataError as first:
                error = first
                break
        rows = self.reader.read_steps(begin, good, self.rank, self.world) if good > begin else None
        return _Item(rows, good - begin, error)


class TrainingBatches:
    """The micro-batches of one rank in the steps [first_step, last_step), in order; iterated anew, from the start."""

    def __init__(self, reader: Reader, rank: int, world: int, first_step: int, last_step: int,
                 workers: int = 0) -> None:
        """workers: loader processes; 0 reads in this one."""
        self.reader, self.workers = reader, workers
        together = max(1, READ_TOKENS * world // reader.config.tokens_per_step)
        self.items = _Items(reader, rank, world, first_step, last_step, together)

    def __iter__(self) -> Iterator[Batch]:
        """DataError: a row of the step that comes next cannot be read."""
        coming = self._batches()
        atexit.register(coming.close)  # an error of somebody else's may keep this alive, and its processes, to the end
        try:
            yield from coming
        finally:
            coming.close()
            atexit.unregister(coming.close)

    def _batches(self) -> Generator[Batch, None, None]:
        items: Iterator[_Item] = (self.items[index] for index in range(len(self.items)))
        workers, before = min(self.workers, len(self.items)), set(multiprocessing.active_children())
        if workers:
            items = iter(DataLoader(self.items, batch_size=None, num_workers=workers, collate_fn=_as_it_is,
                                    worker_init_fn=_ignore_signals))
        loaders = set(multiprocessing.active_children()) - before
        try:
            for item in items:
                if item.rows is not None:
                    yield from batches(item.rows, item.steps, self.reader.config.micro_batch_size)
                if item.error is not None:
                    raise item.error
        finally:
            del items  # ends the loader processes, which a signal would not
            for loader in loaders:  # nor does every Python hear of it that waits for its first item
                loader.join(LEAVE_SECONDS)
                if loader.is_alive():
                    loader.kill()


def _as_it_is(item: Any) -> Any:
    return item


def _ignore_signals(worker: int) -> None:
    """Loader processes leave when their parent does; signals are for the parent to answer."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class ValidationBatches(torch.utils.data.Dataset[Batch]):
    """One rank's part of the validation rows; every rank has the same number of batches.

    `Batch.samples` index `Reader.validation_rows`; the step's counts are those of the batch itself.
    """

    def __init__(self, reader: Reader, rank: int = 0, world: int = 1) -> None:
        self.reader = reader
        self.samples = reader.places(len(reader.validation_rows), rank, world)

    def __len__(self) -> int:
        return len(self.samples) // self.reader.config.micro_batch_size

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        size = self.reader.config.micro_batch_size
        return self.reader.validation_batch(self.samples[index * size:(index + 1) * size])
