"""One task of a build: its texts into shards of both splits, continued where an earlier attempt was interrupted.

The texts of an interrupted task are read again, for that is cheap, and only those are tokenised that lie in no
finished shard. The task is done once `tasks/TTTTTT.done` says how many shards it has; a process holds its lock while
it works, so that two never write the same shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dlcm_lightning.data.building.documents import SPLITS, Document, documents_of, split_of
from dlcm_lightning.data.building.formats import read_texts
from dlcm_lightning.data.building.locks import locked
from dlcm_lightning.data.building.merge import TASKS
from dlcm_lightning.data.building.plan import Plan
from dlcm_lightning.data.building.writer import ShardWriter
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.durable import write_atomically

BATCH_CHARACTERS = 1_000_000
"""Text that each thread of the tokenizer is given at once."""

Meter = Callable[[int, int], None]
"""Told of input bytes read and of tokens made."""


class Task:
    """A task of a plan, in a working folder."""

    def __init__(self, plan: Plan, working: Path, number: int) -> None:
        self.plan, self.working, self.number = plan, working, number
        (working / TASKS).mkdir(exist_ok=True)
        self._record = working / TASKS / f"{number:06d}.done"

    def work(self, files: Sequence[Path], tokenizer: Tokenizer, meter: Meter, *, threads: int, wait: bool) -> bool:
        """Does the task unless it is done. False: another process is at it, and `wait` is not set."""
        read = 0

        def advance(count: int) -> None:
            nonlocal read
            read += count
            meter(count, 0)

        with locked(self._record.with_suffix(".lock"), wait=wait) as mine:
            if not mine:
                return False
            if not self._record.is_file():
                texts = (text for file in files for text in read_texts(file, self.plan.text_field, advance))
                self.write(texts, tokenizer, meter, threads=threads)
            total = sum(self.plan.sizes[place] for place in self.plan.tasks()[self.number])
            meter(total - read, 0)
            self._record.with_suffix(".lock").unlink(missing_ok=True)  # whoever waits for it looks for the record
            return True

    def write(self, texts: Iterable[str], tokenizer: Tokenizer, meter: Meter, *, threads: int) -> None:
        """Writes all shards of the task and its record. DataError: finished shards are not of these texts."""
        writers = {split: ShardWriter(
            self.working / split, vocab_size=self.plan.vocab_size, task=self.number,
            shard_bytes=self.plan.shard_bytes, block_tokens=self.plan.block_tokens) for split in SPLITS}

        def missing() -> Iterator[tuple[str, Document]]:
            for document in documents_of(texts):
                split = split_of(document.identity, self.plan.validation_share)
                if not writers[split].has(document.identity):
                    yield split, document

        try:
            for batch in _batches(missing(), BATCH_CHARACTERS * threads):
                encoded = tokenizer.encode_documents([document.text for _, document in batch])
                for (split, document), ids in zip(batch, encoded, strict=True):
                    writers[split].write(ids, document.identity, document.size)
                meter(0, sum(map(len, encoded)))
            counts = {split: len(writer.close()) for split, writer in writers.items()}
        finally:
            for writer in writers.values():
                writer.abandon()
        write_atomically(self._record, (json.dumps(counts) + "\n").encode())


def _batches(documents: Iterable[tuple[str, Document]], characters: int) -> Iterator[list[tuple[str, Document]]]:
    """Lists of about so many characters."""
    batch: list[tuple[str, Document]] = []
    size = 0
    for one in documents:
        batch.append(one)
        size += len(one[1].text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
