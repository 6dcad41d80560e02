"""Which documents of a stream came before, by the md5 of their texts, in bounded memory for a billion of them.

The hashes are taken in chunks that fit into memory. A chunk is sorted, and of equal hashes all but the first are
marked; what survives goes into buckets on disk by its value, so that copies meet in one bucket whichever chunk they
came from. A bucket holds about as much as a chunk, and is sorted and marked the same way. Sorting is stable and
everything stays in the order of the stream, so the first of equal documents stays, always. A stream of one chunk
needs no bucket.

Memory: one bit a document (125 MB for a billion) and under 1 GB for a chunk; disk: 24 bytes a document. Measured on 20
million hashes and two shared cores: 0.8 million documents a second.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from dlcm_lightning.errors import DataError

CHUNK_DOCUMENTS = 2**23
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<i8")])
"""Both halves of the md5, and the place of the document in the stream."""


class Marks:
    """A bit for each document of a stream."""

    def __init__(self, documents: int) -> None:
        self._bits = np.zeros((documents + 7) // 8, dtype=np.uint8)

    def add(self, numbers: np.ndarray) -> None:
        np.bitwise_or.at(self._bits, numbers >> 3, (128 >> (numbers & 7)).astype(np.uint8))

    def of(self, first: int, count: int) -> np.ndarray:
        """(count,) bool: the marks of documents [first, first + count)."""
        bits = np.unpackbits(self._bits[first // 8:(first + count + 7) // 8])
        return bits[first % 8:first % 8 + count].astype(bool)


def find_duplicates(hashes: Iterable[np.ndarray], documents: int, scratch: Path, *,
                    chunk_documents: int = CHUNK_DOCUMENTS,
                    advance: Callable[[int], object] = lambda _: None) -> Marks:
    """Marks every document whose md5 came before.

    hashes: (n, 2) uint64 arrays, the two halves of each md5, in the order of the stream; together `documents` rows.
    scratch: a folder that is made, and removed, if buckets are needed. advance: told of documents as they pass.
    """
    marks = Marks(documents)
    buckets = math.ceil(2 * documents / chunk_documents) if documents > chunk_documents else 0
    if buckets:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    seen = 0
    for chunk in _chunks(hashes, chunk_documents):
        records = np.empty(len(chunk), dtype=RECORD)
        records["high"], records["low"] = chunk[:, 0], chunk[:, 1]
        records["number"] = np.arange(seen, seen + len(chunk))
        seen += len(chunk)
        later = _later(records)
        marks.add(records["number"][later])
        if buckets:
            _scatter(records[~later], buckets, scratch)
        advance(len(chunk))
    if seen != documents:
        raise DataError(f"{seen} hashes of {documents} documents; the shards are not whole, build them again")
    for bucket in range(buckets):
        path = scratch / f"{bucket:05d}"
        if path.is_file():
            records = np.fromfile(path, dtype=RECORD)
            marks.add(records["number"][_later(records)])
            path.unlink()
    if buckets:
        shutil.rmtree(scratch)
    return marks


def _chunks(hashes: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same rows, `size` at a time."""
    held: list[np.ndarray] = []
    count = 0
    for part in hashes:
        while len(part):
            taken, part = part[:size - count], part[size - count:]
            held.append(taken)
            count += len(taken)
            if count == size:
                yield np.concatenate(held)
                held, count = [], 0
    if count:
        yield np.concatenate(held)


def _later(records: np.ndarray) -> np.ndarray:
    """(n,) bool: records whose hash an earlier one has."""
    order = np.lexsort((records["low"], records["high"]))
    high, low = records["high"][order], records["low"][order]
    found = np.zeros(len(records), dtype=bool)
    found[order[1:]] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    return found


def _scatter(records: np.ndarray, buckets: int, scratch: Path) -> None:
    """Appends records to their buckets. The low half decides: a split is chosen by the high one and so not even."""
    numbers = ((records["low"] >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)
    order = np.argsort(numbers, kind="stable")
    ends = np.searchsorted(numbers[order], np.arange(buckets), side="right")
    begin = 0
    for bucket, end in enumerate(ends.tolist()):
        if end > begin:
            with (scratch / f"{bucket:05d}").open("ab") as file:
                records[order[begin:end]].tofile(file)
        begin = end
