"""An input as a stream of bytes: a file, what lies at an address, the output of a command.

Every byte that is read is counted and hashed. A file that grows, shrinks or is replaced while it is read is half of one
text and half of another: its stamp and its length are compared at both ends, and a difference is an error.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dlcm_lightning.data.preprocessing.inputs import PIPE, stamp_of
from dlcm_lightning.data.preprocessing.plan import Input
from dlcm_lightning.data.store import CHUNK_BYTES, Chunks, store_at
from dlcm_lightning.data.webdataset_library import webdataset
from dlcm_lightning.errors import DataError
from dlcm_lightning.paths import is_address

Advance = Callable[[int], object]
"""Told how many bytes of an input were consumed."""
READ_BYTES = 1024**2
REMOTE_BYTES = 16 * CHUNK_BYTES
"""Held of a remote input."""
AHEAD_BYTES = 4 * CHUNK_BYTES


class Meter(io.RawIOBase):
    """A stream that counts, hashes and tells of every byte read."""

    def __init__(self, raw: BinaryIO, advance: Advance) -> None:
        self._raw, self._advance = raw, advance
        self.hashed, self.count = hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        found = self._raw.read(len(target))
        target[:len(found)] = found
        self.hashed.update(found)
        self.count += len(found)
        self._advance(len(found))
        return len(found)


@contextmanager
def measured(file: Input, advance: Advance) -> Iterator[tuple[BinaryIO, Meter]]:
    """A stream of an input, buffered, and its meter; read it to its end. DataError: the input changed meanwhile, a
    command failed. OSError: it cannot be read."""
    with raw_bytes(file) as raw:
        _check_stamp(file, raw)
        meter = Meter(raw, advance)
        try:
            yield io.BufferedReader(meter, READ_BYTES), meter
        except Exception:
            _check_stamp(file, raw)  # a change explains whatever else is wrong
            raise
        while meter.readinto(bytearray(READ_BYTES)):  # what a reader left behind the end of what it knows
            pass
        _check_stamp(file, raw)
        if file.size >= 0 and meter.count != file.size:
            raise DataError(f"{file.place}: had {file.size:,} bytes when the build began and {meter.count:,} now; wait "
                            "until it is written, then run the same command again")


@contextmanager
def raw_bytes(file: Input) -> Iterator[BinaryIO]:
    """A stream of an input; seekable where it is no command. OSError, ImportError: it cannot be had."""
    if file.place.startswith(PIPE):
        stream = webdataset("gopen").gopen(file.place)
        try:
            yield stream
        finally:
            stream.close()  # OSError where the command failed
    elif is_address(file.place):
        yield _remote(file)
    else:
        with Path(file.place).open("rb", buffering=0) as local:
            yield local


def _check_stamp(file: Input, raw: BinaryIO) -> None:
    if not (file.stamp and isinstance(raw, io.FileIO)):
        return
    if stamp_of(os.fstat(raw.fileno())) != file.stamp:
        raise DataError(f"{file.place}: was changed after the build began; wait until it is written, then run the same "
                        "command again")


def _remote(file: Input) -> BinaryIO:
    folder, _, name = file.place.rpartition("/")
    content = store_at(folder, Chunks(REMOTE_BYTES)).open(name, file.size)
    return io.BufferedReader(_Ranges(content, file.size), READ_BYTES)


class _Ranges(io.RawIOBase):
    """A remote file, read through the chunks of a store, a little ahead."""

    def __init__(self, content: Any, size: int) -> None:
        self._content, self._size, self._at = content, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        end = min(self._size, self._at + len(target))
        if end <= self._at:
            return 0
        self._content.prefetch(self._at, min(self._size, end + AHEAD_BYTES))
        found = self._content.read(self._at, end)
        target[:len(found)] = found
        self._at = end
        return len(found)
