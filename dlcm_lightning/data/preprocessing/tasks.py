"""One task of a build: its texts into shards of both splits, continued where an earlier attempt was interrupted.

The texts of an interrupted task are read again, for that is cheap, and only those are tokenised that lie in no
finished shard. A document whose tokens do not stand for as many bytes as its text has is an error: the tokenizer has
changed it. The task is done once its record is written (records.py); a process holds its lock while it works, so that
two never write the same shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dlcm_lightning.data.preprocessing.documents import SPLITS, Document, LongText, Text, document_of, split_of
from dlcm_lightning.data.preprocessing.formats import Reading, read_texts
from dlcm_lightning.data.preprocessing.locks import locked
from dlcm_lightning.data.preprocessing.plan import Input, Plan
from dlcm_lightning.data.preprocessing.records import TASKS, Record, record_path, write_record
from dlcm_lightning.data.preprocessing.writer import ShardWriter
from dlcm_lightning.data.text_encoder import Encoder
from dlcm_lightning.errors import DataError

NOTHING = np.empty(0, dtype=np.uint32)
BATCH_CHARACTERS = 1_000_000
"""Text that each thread of the tokenizer is given at once."""


class Meter(Protocol):
    """Told of input bytes whose texts are tokenised, and of tokens made."""

    def __call__(self, read: int, tokens: int) -> None: ...


class _Told:
    """Tells a meter of input bytes once their texts are tokenised, not when they are read."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._waiting, self._told = meter, 0, 0

    def read(self, count: int) -> None:
        self._waiting += count

    def batch(self) -> int:
        """Bytes read since the last call."""
        count, self._waiting = self._waiting, 0
        return count

    def tokenised(self, count: int, tokens: int) -> None:
        self._told += count
        self._meter(count, tokens)

    def finish(self, total: int) -> None:
        self._meter(max(0, total - self._told), 0)


class _Missing(NamedTuple):
    """A document that lies in no finished shard."""

    split: str
    document: Document
    place: str


class Task:
    """A task of a plan, in a working folder."""

    def __init__(self, plan: Plan, working: Path, number: int) -> None:
        self.plan, self.working, self.number = plan, working, number
        (working / TASKS).mkdir(exist_ok=True)
        self._record = record_path(working, number)

    def work(self, files: Sequence[Input], encoder: Encoder, meter: Meter, *, threads: int, wait: bool,
             at: Callable[[str], object] = lambda _: None) -> bool:
        """Does the task unless it is done. False: another process is at it, and `wait` is not set.

        at: told of the place in the inputs before each step that takes long.
        """
        reading, told = Reading(), _Told(meter)
        with locked(self._record.with_suffix(".lock"), wait=wait) as mine:
            if not mine:
                return False
            if not self._record.is_file():
                texts = (text for file in files for text in read_texts(file, self.plan.text_field, told.read, reading))
                names = tuple(file.name for file in files)
                self._write(texts, encoder, told, reading, names, at, threads)
            told.finish(sum(max(0, file.size) for file in files))
            self._record.with_suffix(".lock").unlink(missing_ok=True)  # whoever waits for it looks for the record
            return True

    def write(self, texts: Iterable[Text], encoder: Encoder, meter: Meter, *, threads: int) -> None:
        """Writes all shards of a task of texts in memory, and its record.

        DataError: finished shards are not of these texts, the tokenizer changes a text.
        """
        told = _Told(meter)

        def counted() -> Iterator[Text]:
            for text in texts:
                told.read(len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else len(text.content))
                yield text

        self._write(counted(), encoder, told, Reading(), (), lambda _: None, threads)

    def _write(self, texts: Iterable[Text], encoder: Encoder, told: _Told, reading: Reading, names: tuple[str, ...],
               at: Callable[[str], object], threads: int) -> None:
        writers = {split: ShardWriter(
            self.working / split, vocab_size=self.plan.vocab_size, task=self.number,
            shard_bytes=self.plan.shard_bytes, block_tokens=self.plan.block_tokens) for split in SPLITS}
        try:
            batches = _batches(self._missing(texts, writers, reading), BATCH_CHARACTERS * threads)
            for batch, encoded in _encoded(batches, encoder, told, at):
                _write(batch, encoded, encoder, writers)
            counts = {split: len(writer.close()) for split, writer in writers.items()}
        finally:
            for writer in writers.values():
                writer.abandon()
        write_record(self.working, self.number, Record(counts, names, tuple(reading.digests), reading.account))

    def _missing(self, texts: Iterable[Text], writers: dict[str, ShardWriter], reading: Reading) -> Iterator[_Missing]:
        account = reading.account
        for text in texts:
            document = document_of(text)
            if document is None:
                account.blanks += 1
                continue
            account.document(reading.kind, document.size, reading.named)
            account.replaced_characters += document.replaced
            split = split_of(document.identity, self.plan.validation_share)
            if not writers[split].has(document.identity):
                yield _Missing(split, document, reading.place)


def _batches(documents: Iterator[_Missing], characters: int) -> Iterator[tuple[list[_Missing], list[str] | LongText]]:
    """Documents of about so many characters, and their texts; a long one by itself."""
    batch: list[_Missing] = []
    texts: list[str] = []
    size = 0
    for one in documents:
        text = one.document.text
        if isinstance(text, LongText):
            if batch:
                yield batch, texts
            yield [one], text
            batch, texts, size = [], [], 0
            continue
        batch.append(one)
        texts.append(text)
        size += len(text)
        if size >= characters:
            yield batch, texts
            batch, texts, size = [], [], 0
    if batch:
        yield batch, texts


def _encoded(batches: Iterator[tuple[list[_Missing], list[str] | LongText]], encoder: Encoder, told: _Told,
             at: Callable[[str], object]) -> Iterator[tuple[list[_Missing], list[np.ndarray]]]:
    """Batches with their ids, in order. While one is encoded, the one before it is written and the next one is read: a
    thread does it, for the library lets Python go on meanwhile."""
    work: deque[tuple[list[_Missing], int, Future[list[np.ndarray]]]] = deque()

    def oldest() -> tuple[list[_Missing], list[np.ndarray]]:
        batch, count, future = work.popleft()
        encoded = future.result()
        told.tokenised(count, sum(map(len, encoded)))
        return batch, encoded

    with ThreadPoolExecutor(1) as thread:
        for batch, texts in batches:
            at(batch[0].place if len(batch) == 1 else f"{batch[0].place} to {batch[-1].place}")
            if isinstance(texts, LongText):  # alone, for it fills the memory that there is
                while work:
                    yield oldest()
                yield batch, [_encode_long(texts, batch[0].place, encoder, told)]
                continue
            work.append((batch, told.batch(), thread.submit(encoder.encode_documents, texts)))
            if len(work) > 1:
                yield oldest()
        while work:
            yield oldest()


def _encode_long(text: LongText, place: str, encoder: Encoder, told: _Told) -> np.ndarray:
    """The ids of a long text, which is given up for them."""
    left, waiting = len(text.content), told.batch()

    def advance(size: int, tokens: int) -> None:
        nonlocal left, waiting
        count = int(waiting * size / max(size, left))
        left, waiting = left - size, waiting - count
        told.tokenised(count, tokens)

    try:
        encoded = encoder.encode_long(text.content, advance)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    text.release()
    return encoded


def _write(batch: list[_Missing], encoded: list[np.ndarray], encoder: Encoder, writers: dict[str, ShardWriter]) -> None:
    """Writes documents. DataError: their ids do not stand for their bytes."""
    stated = np.array([one.document.size for one in batch])
    for place in np.flatnonzero(encoder.bytes_of(encoded) != stated)[:1].tolist():
        raise DataError(f"{batch[place].place}: the tokens of this document do not stand for the bytes of its text; "
                        "the tokenizer changes it, choose another")
    for place, one in enumerate(batch):
        writers[one.split].write(encoded[place], one.document.identity, one.document.size)
        encoded[place] = NOTHING
